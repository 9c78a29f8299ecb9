"""The parts of the law on the device, each against its plain reference: noise, the cut, penalties."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from octavo.engine import sampling as law
from octavo.runners.base import SlotState
from octavo.runners.cuda import cut, shape_logits
from octavo.runners.cuda.cut import LAST_ID, LEAST, find_cut, place_of
from octavo.runners.cuda.laws import SlotLaws
from octavo.runners.cuda.noise import gumbel, random_words
from octavo.types import Sampling

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "engine" / "golden_sampling.json").read_text(encoding="utf-8")
)


@triton.jit(do_not_specialize=["choice", "low", "high", "position", "first"])
def noise_kernel(words, noise, first, position, low, high, choice, COUNT: tl.constexpr):  # noqa: N803
    index = tl.arange(0, COUNT)
    found = random_words(first, position, low, high, choice, COUNT)
    tl.store(words + index, found.to(tl.int32, bitcast=True))
    tl.store(noise + index, gumbel(found))


@triton.jit
def cut_kernel(scores, stays, temperature, top_k, top_p, V: tl.constexpr, PIVOTS: tl.constexpr):  # noqa: N803
    token = tl.arange(0, 256)
    score = tl.load(scores + token, mask=token < V, other=float("-inf"))
    most = tl.max(score, 0)
    low = place_of(temperature * 0 + LEAST, LAST_ID)
    rounds = top_k * 0
    low, rounds = find_cut(
        scores, 0, V, low, most, temperature, top_k, top_k > 0, scores, scores, 0, scores, rounds,
        False, 1, 1, PIVOTS, 0, 64, 128,
    )  # fmt: skip
    low, rounds = find_cut(
        scores, 0, V, low, most, temperature, top_p, top_p < 1.0, scores, scores, 0, scores, rounds,
        True, 1, 1, PIVOTS, 0, 64, 128,
    )  # fmt: skip
    tl.store(stays + token, (place_of(score, token) >= low).to(tl.int32), mask=token < V)


def signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


@pytest.mark.parametrize("case", GOLDEN["noise"], ids=lambda case: str(GOLDEN["noise"].index(case)))
def test_golden_noise(case: dict[str, Any], device: torch.device) -> None:
    words = torch.zeros(16, dtype=torch.int32, device=device)
    noise = torch.zeros(16, device=device)
    keys = [signed(word) for word in (case["seed"] & 0xFFFFFFFF, case["seed"] >> 32, case["choice"])]
    for token, want_word, want in zip(case["token_ids"], case["words"], case["gumbel"], strict=True):
        first = token // 4 * 4
        noise_kernel[(1,)](words, noise, first, case["position"], *keys, COUNT=16)
        assert int(words[token - first]) & 0xFFFFFFFF == want_word
        assert float(noise[token - first]) == pytest.approx(want, abs=4e-6)


def test_noise_at_the_ends_of_its_range(device: torch.device) -> None:
    """Small words give large noise; the largest word rounds to 1, which the law stops short of."""
    for word in (0, 1, 255, 0x7FFFFFFF, 0x80000000, 0xFFFFFF7F, 0xFFFFFFFF):
        assert_noise_of(word, device)


@triton.jit
def gumbel_kernel(words, noise):
    tl.store(noise, gumbel(tl.load(words).to(tl.uint32, bitcast=True)))


def assert_noise_of(word: int, device: torch.device) -> None:
    words = torch.tensor([signed(word)], dtype=torch.int32, device=device)
    noise = torch.zeros(1, device=device)
    gumbel_kernel[(1,)](words, noise)
    want = law.gumbel(np.array([word], np.uint32))
    assert float(noise) == pytest.approx(float(want[0]), abs=4e-6)


@pytest.mark.parametrize(
    ("kind", "temperature", "top_k", "top_p"),
    [
        ("normal", 1.0, 7, 1.0),
        ("normal", 0.7, 0, 0.6),
        ("normal", 1.3, 60, 0.9),
        ("normal", 1.0, 250, 1.0),
        ("ties", 1.0, 11, 1.0),
        ("ties", 1.0, 0, 0.37),
        ("equal", 1.0, 5, 0.5),
        ("zeros", 1.0, 3, 1.0),
        ("far", 1.0, 20, 0.999),
        ("masked", 1.0, 50, 1.0),
    ],
)
def test_the_cut_is_the_sorts(
    kind: str, temperature: float, top_k: int, top_p: float, device: torch.device
) -> None:
    vocabulary = 200
    scores = torch.randn(vocabulary, generator=torch.Generator().manual_seed(3))
    if kind == "ties":
        scores = scores.round()
    if kind == "equal":
        scores.fill_(-2.5)
    if kind == "zeros":
        scores = torch.where(torch.arange(vocabulary) % 2 == 0, 0.0, -0.0)
    if kind == "far":
        scores *= 1e30
    if kind == "masked":
        scores[30:] = -torch.inf
    scores = scores.to(device)
    stays = torch.zeros(vocabulary, dtype=torch.int32, device=device)
    with np.errstate(over="ignore"):
        cut_kernel[(1,)](scores, stays, temperature, top_k, top_p, V=vocabulary, PIVOTS=32)
    want = cut.reference(scores, temperature, top_k, top_p)
    assert stays.bool().tolist() == want.tolist()


def test_penalties_bias_and_mask_are_the_references_bits(device: torch.device) -> None:
    vocabulary = 70
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(vocabulary, generator=generator).to(device)
    sampling = Sampling(
        repetition_penalty=1.3,
        frequency_penalty=0.37,
        presence_penalty=-0.21,
        logit_bias=((4, 1.5), (69, -3.25)),
    )
    laws = SlotLaws.empty(1, vocabulary, device)
    laws.open(0, SlotState([4, 8, 15, 8, 8, 69], 3, sampling))
    address = logits.data_ptr()
    rows = torch.tensor([[0, address, address, 0]], dtype=torch.int64, device=device)
    allowed = torch.rand(vocabulary, generator=generator) < 0.7
    packed = np.packbits(np.pad(allowed.numpy(), (0, 96 - vocabulary)), bitorder="little").view(np.int32)
    pieces = -(-vocabulary // shape_logits.PIECE_TOKENS)
    scores, stats = torch.zeros((1, vocabulary), device=device), torch.zeros((1, pieces, 3), device=device)
    ids, arrived = torch.zeros((2, 1, pieces), dtype=torch.int32, device=device)
    shape_logits.shape_logits(
        rows, laws, torch.from_numpy(packed).to(device)[None], scores, stats, ids, arrived[0], spare_slot=1
    )
    biases = torch.zeros(vocabulary)
    biases[4], biases[69] = 1.5, -3.25
    want = shape_logits.reference(
        logits, laws.counts[0], (1.3, 0.37, -0.21), biases.to(device), allowed.to(device)
    )
    assert scores[0].tolist() == want.tolist()
    assert float(stats[0, 0, 0]) == float(want.max())
    assert int(ids[0, 0]) == int(want.argmax())
