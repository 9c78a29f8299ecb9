"""The sampling law in C++: its golden vectors, and the numpy law on random rows."""

from __future__ import annotations

import ctypes
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.engine.sampling import TokenCounts, keep, sample_token, scale, shape_logits, token_logprob
from octavo.errors import NumericalError
from octavo.runners.cpu import library
from octavo.runners.cpu.library import ISA_NAMES, IsaName
from octavo.runners.cpu.sampling import WantedTokens, sampling_struct
from octavo.types import Sampling, TokenLogprob

GOLDEN = json.loads((Path(__file__).parents[1] / "engine" / "golden_sampling.json").read_text())
VOCAB = len(next(iter(GOLDEN["rows"].values())))


def native_sample(
    isa: IsaName,
    logits: np.ndarray,
    sampling: Sampling,
    prompt: list[int],
    generated: list[int],
    mask: np.ndarray | None = None,
    top: int | None = None,
    replaced: np.ndarray | None = None,
) -> tuple[int, TokenLogprob | None]:
    struct, kept = sampling_struct(sampling, len(logits))
    row = np.ascontiguousarray(logits, np.float32)
    ids = np.array([*prompt, *generated], np.int32)
    sample = library.SampleStruct()
    wanted = WantedTokens(0, len(row), mask=mask, top_logprobs=top, logits=replaced)
    wanted.fill(sample)
    status = library.native().octavo_test_sample(
        ISA_NAMES.index(isa),
        ctypes.byref(struct),
        row.ctypes.data,
        len(row),
        ids.ctypes.data,
        len(ids),
        len(prompt),
        ctypes.byref(sample),
    )
    assert status == 0
    del kept
    (sampled,) = wanted.read(sample)
    return sampled.token_id, sampled.logprob


def golden_row(name: str) -> np.ndarray:
    return np.array([float(x) for x in GOLDEN["rows"][name]], np.float32)


@pytest.mark.parametrize("index", range(len(GOLDEN["cases"])))
def test_golden_tokens(isa: IsaName, index: int) -> None:
    case = GOLDEN["cases"][index]
    fields: dict[str, Any] = dict(case["sampling"])
    if "logit_bias" in fields:
        fields["logit_bias"] = tuple((i, v) for i, v in fields["logit_bias"])
    mask = None if case["mask"] is None else np.array(case["mask"], np.uint32)
    token, _ = native_sample(
        isa, golden_row(case["row"]), Sampling(**fields), case["prompt"], case["generated"], mask
    )
    assert token == (-1 if case["token"] is None else case["token"])


def test_golden_logprobs(isa: IsaName) -> None:
    for case in GOLDEN["logprobs"]:
        row = golden_row(case["row"])
        # A bias that decides the token: logprobs are of the unmodified row.
        sampling = Sampling(temperature=0.0, logit_bias=((case["token"], 1e6),))
        token, logprob = native_sample(isa, row, sampling, [], [], top=min(case["top"], VOCAB))
        assert token == case["token"]
        assert logprob is not None
        assert logprob.logprob == pytest.approx(float(case["logprob"]), abs=1e-4, rel=1e-6)
        assert [i for i, _ in logprob.top] == [i for i, v in case["alternatives"] if float(v) > -math.inf]


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 0, 1, 7, 60, 1500, 5000]),
    top_p=st.sampled_from([1.0, 1.0, 0.3, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.4]),
    frequency_penalty=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 2**64 - 1),
    choice=st.integers(0, 3),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sampling=SAMPLINGS, vocab=st.sampled_from([1, 3, 101, 1024, 4099]), seed=st.integers(0, 2**32))
def test_random_rows(isa: IsaName, sampling: Sampling, vocab: int, seed: int) -> None:
    source = np.random.default_rng(seed)
    logits = source.normal(0, 3, vocab).astype(np.float32)
    if source.random() < 0.3:
        logits = np.round(logits)  # ties
    ids = [int(i) for i in source.integers(0, vocab, 12)]
    counts = TokenCounts.of(ids, 7, vocab)
    token, logprob = native_sample(isa, logits, sampling, ids[:7], ids[7:], top=min(5, vocab))
    want = sample_token(logits, sampling, len(ids), counts)
    if token != want:
        # Rounding may move a token over the edge of top-p, or swap two whose y + g are all but equal.
        shaped = shape_logits(logits, sampling, counts)
        assert sampling.temperature > 0
        scaled = scale(shaped, sampling.temperature)
        assert sampling.top_p < 1 or _gap(scaled, sampling, keep(shaped, scaled, sampling), len(ids)) < 1e-5
    best = token_logprob(logits, token, min(5, vocab))
    assert logprob is not None
    assert logprob.logprob == pytest.approx(best.logprob, abs=1e-4)
    assert [i for i, _ in logprob.top] == [i for i, _ in best.top]


def _gap(scaled: np.ndarray, sampling: Sampling, ids: np.ndarray, position: int) -> float:
    from octavo.engine.sampling import gumbel, random_words

    sums = np.sort(scaled[ids] + gumbel(random_words(ids, position, sampling.seed, sampling.choice)))
    return float(sums[-1] - sums[-2]) if len(sums) > 1 else math.inf


def test_frequencies(isa: IsaName) -> None:
    """Over many seeds, tokens come as often as their probabilities say (chi-squared, 0.1 % level)."""
    logits = np.array([0.0, 1.0, -1.0, 2.0, 0.5, -3.0, 1.5, 0.1, -0.4], np.float32)
    draws = 4000
    found = [native_sample(isa, logits, Sampling(seed=seed), [], [])[0] for seed in range(draws)]
    expected = np.exp(logits) / np.exp(logits).sum() * draws
    counts = np.bincount(found, minlength=len(logits))
    assert ((counts - expected) ** 2 / expected).sum() < 26.1


def test_rows_that_are_not_finite(isa: IsaName) -> None:
    row = np.zeros(50, np.float32)
    for index in (0, 8, 47, 49):
        for value in (np.nan, np.inf):
            broken = row.copy()
            broken[index] = value
            assert native_sample(isa, broken, Sampling(), [], [])[0] == -1
            with pytest.raises(NumericalError):
                sample_token(broken, Sampling(), 0)
    assert native_sample(isa, np.full(50, -np.inf, np.float32), Sampling(), [], [])[0] == -1
    one_left = np.full(50, -np.inf, np.float32)
    one_left[49] = -3
    assert native_sample(isa, one_left, Sampling(), [], [])[0] == 49


def test_replaced_logits(isa: IsaName) -> None:
    """The token is the replacement's, its logprobs are the model's; either must be finite."""
    source = np.random.default_rng(3)
    row, other = source.normal(0, 3, (2, 301)).astype(np.float32)
    sampling = Sampling(seed=11)
    token, logprob = native_sample(isa, row, sampling, [1, 2], [3], top=4, replaced=other)
    assert token == native_sample(isa, other, sampling, [1, 2], [3])[0]
    assert token != native_sample(isa, row, sampling, [1, 2], [3])[0]
    assert logprob is not None
    want = token_logprob(row, token, 4)
    assert logprob.logprob == pytest.approx(want.logprob, abs=1e-4)
    assert [i for i, _ in logprob.top] == [i for i, _ in want.top]
    broken = np.full_like(row, np.nan)
    assert native_sample(isa, row, sampling, [], [], replaced=broken)[0] == -1
    assert native_sample(isa, broken, sampling, [], [], replaced=other)[0] == -1
