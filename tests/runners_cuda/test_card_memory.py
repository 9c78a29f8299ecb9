"""What is said where the card has no room adds up, and names flags."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from octavo.models.spec import Attention, DenseMLP, LayerNorms, LayerSpec, ModelSpec, Norm
from octavo.runners.base import RunnerConfig
from octavo.runners.cuda.card_memory import kv_bytes, no_room_to_load, no_room_to_run
from octavo.runners.cuda.kv_cache import make_cache
from octavo.runners.cuda.limits import LIBRARY_BYTES, activation_bytes

RMS = Norm("rms", 1e-6)


def layer(window: int | None) -> LayerSpec:
    mixer = Attention(heads=4, kv_heads=2, head_dim=32, scale=0.2, rope=None, window=window)
    return LayerSpec(LayerNorms(RMS, None, RMS, None), mixer, DenseMLP(256, "silu"))


SPEC = ModelSpec("tiny", 512, 128, (layer(None), layer(40), layer(None)), RMS, 1024, tied_head=False)
CONFIG = RunnerConfig(
    device="cuda:1",
    compute_dtype="bfloat16",
    kv_dtype="bfloat16",
    context_tokens=1024,
    max_slots=4,
    kv_pages=(9, 4),
    prefill_chunk_tokens=512,
    threads=None,
)


def test_kv_bytes_are_those_of_every_page_and_a_spare_one() -> None:
    token = 2 * 2 * 32 * 2  # keys and values of two heads of 32, in 16 bits
    assert kv_bytes(SPEC, CONFIG) == 32 * token * (2 * (9 + 1) + 1 * (4 + 1))


@pytest.mark.parametrize("kv", ["bfloat16", "int8"])
def test_kv_bytes_are_what_is_allocated(kv: str) -> None:
    caches = make_cache(
        SPEC, [pages + 1 for pages in CONFIG.kv_pages], getattr(torch, kv), torch.device("cpu")
    )
    made = sum(cache.keys.nbytes + cache.values.nbytes for cache in caches)
    assert made == kv_bytes(SPEC, dataclasses.replace(CONFIG, kv_dtype=kv))


def test_a_load_says_all_of_its_need_by_part() -> None:
    error = no_room_to_load(SPEC, CONFIG, 3 << 30, 1 << 30)
    beside = kv_bytes(SPEC, CONFIG) + activation_bytes(SPEC, CONFIG) + LIBRARY_BYTES
    assert error.needed_bytes == (3 << 30) + beside
    assert error.available_bytes == 1 << 30
    for said in ("cuda:1", "weights 3.0 GiB", "kv ", "activations ", "1.0 GiB were free"):
        assert said in error.message
    assert "--context" in error.remedy


def test_a_step_says_that_it_was_planned_for() -> None:
    error = no_room_to_run(SPEC, CONFIG, 5 << 20)
    assert error.needed_bytes == activation_bytes(SPEC, CONFIG)
    assert "5 MiB are free" in error.message
    more = no_room_to_run(SPEC, dataclasses.replace(CONFIG, max_slots=64), 5 << 20)
    assert more.needed_bytes > error.needed_bytes
