"""One arithmetic for all: a sequence's logits are the same bits however it is cut, alone and among others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from octavo.errors import IncompatibleModelError
from octavo.models.spec import DenseMLP
from octavo.quant.affine import INT8
from octavo.runners.base import Adapter, Batch
from octavo.runners.cuda import batch_decode, limits
from octavo.runners.cuda.layout import CUDA_B64
from octavo.runners.cuda.runner import CudaRunner
from octavo.types import Sampling

IDS = [5, 9, 2, 33, 17, 4, 41]


@pytest.fixture(autouse=True)
def arithmetic_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """These steps have a few rows, real ones 64 or more, whose activations get one scale a token."""
    monkeypatch.setattr(batch_decode, "BLOCKS_UP_TO", 1)


@contextmanager
def driven(models: ModuleType, device: torch.device, deterministic: bool) -> Iterator[Any]:
    attention = models.attention(heads=2, kv_heads=1, head_dim=16, rope=models.rope(8), window=4)
    spec = models.model(models.layer(attention, DenseMLP(96, "silu")), hidden_size=64, vocab_size=64)
    config = replace(
        models.runner_config(spec),
        device="cuda:0" if device.type == "cuda" else "cpu",
        compute_dtype="float16",
        kv_dtype="float16",
        threads=None,
        deterministic=deterministic,
    )
    runner = CudaRunner(spec, models.make_tiny(spec, INT8).open(CUDA_B64), config)
    try:
        yield models.Driver(spec, runner)
    finally:
        runner.close()


def logits(drive: Any, slot: int, cuts: Sequence[int]) -> np.ndarray:
    """After IDS, fed in chunks that end at `cuts`, and decoded one by one from the last of them on."""
    drive.open(slot, IDS)
    for first, end in zip((0, *cuts), cuts, strict=False):
        drive.runner.forward(Batch((drive.chunk(slot, first, IDS[first:end]),)))
    for at in range(cuts[-1], len(IDS)):
        drive.runner._last_tokens[slot] = IDS[at]
        drive.runner.forward(Batch((drive.chunk(slot, at, None),)))
    found: np.ndarray = drive.runner.logits(slot)
    return found


@pytest.mark.parametrize("deterministic", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_bits_are_the_same_however_a_prompt_is_cut_and_in_any_batch(
    deterministic: bool, tiny_models: ModuleType, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DETERMINISTIC_ROWS", 4)
    with driven(tiny_models, device, deterministic) as drive:
        info = drive.runner.info
        assert (info.batch_invariant, info.chunk_invariant) == (deterministic, deterministic)
        whole = logits(drive, 0, [7])
        others = [logits(drive, 1, [3, 6])]
        drive.open(2, IDS[:2])
        drive.runner.forward(Batch((drive.chunk(2, 0, IDS[:2], sample=False),)))
        drive.runner._last_tokens[1] = drive.runner._last_tokens[2] = IDS[0]
        drive.runner.forward(Batch((drive.chunk(1, 7, None), drive.chunk(2, 2, None))))
        one, two = drive.runner.logits(1), drive.runner.logits(2)
        drive.runner._last_tokens[0] = IDS[0]
        drive.runner.forward(Batch((drive.chunk(0, 7, None),)))
        pairs = [(whole, other) for other in others] + [(one, drive.runner.logits(0))]
        assert all(np.isfinite(row).all() for row in (whole, one, two))
        same = [np.array_equal(left, right) for left, right in pairs]
        assert all(same) if deterministic else not all(same)
        for left, right in pairs:
            assert np.allclose(left, right, atol=0.05)


def test_prompt_logprobs_do_not_depend_on_the_cut_and_adapters_are_refused(
    tiny_models: ModuleType, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DETERMINISTIC_ROWS", 4)
    targets = (*IDS[1:5], -1)
    with driven(tiny_models, device, deterministic=True) as drive:

        def scores(slot: int, cuts: Sequence[int]) -> list[Any]:
            drive.open(slot, IDS[:5], Sampling(temperature=0.0))
            found: list[Any] = []
            for first, end in zip((0, *cuts), cuts, strict=False):
                chunk = drive.chunk(slot, first, IDS[first:end], targets=targets[first:end], top_logprobs=2)
                (part,) = drive.runner.forward(Batch((chunk,))).result().prompt_logprobs
                found += part
            return found

        assert scores(0, [5]) == scores(1, [1, 5])
        with pytest.raises(IncompatibleModelError, match="deterministic"):
            drive.runner.load_adapter("a", Adapter("", {}))
