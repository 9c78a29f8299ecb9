"""The reference runner's sampling against the numpy law and its golden vectors (docs/sampling.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine import sampling as law
from octavo.errors import NumericalError
from octavo.runners.masks import unpack_mask
from octavo.runners.reference.sampling import gumbel_noise, logprob_of, sample_row
from octavo.types import Sampling

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "engine" / "golden_sampling.json").read_text(encoding="utf-8")
)
CPU = torch.device("cpu")


def row(name: str) -> torch.Tensor:
    return torch.tensor([float(value) for value in GOLDEN["rows"][name]], dtype=torch.float32)


def sampling_of(case: dict[str, Any]) -> Sampling:
    fields = dict(case["sampling"])
    if "logit_bias" in fields:
        fields["logit_bias"] = tuple((int(i), float(b)) for i, b in fields["logit_bias"])
    return Sampling(**fields)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['row']}-{c['sampling']}"[:60])
def test_golden_tokens(case):
    logits = row(case["row"])
    mask = case["mask"]
    allowed = None if mask is None else torch.from_numpy(unpack_mask(np.array(mask, np.uint32), len(logits)))
    history = [*case["prompt"], *case["generated"]]
    token, _ = sample_row(logits, sampling_of(case), history, len(case["prompt"]), allowed)
    assert token == (-1 if case["token"] is None else case["token"])


@pytest.mark.parametrize("case", GOLDEN["logprobs"])
def test_golden_logprobs(case):
    found = logprob_of(row(case["row"]), case["token"], case["top"])
    assert found.logprob == pytest.approx(float(case["logprob"]), rel=1e-6, abs=1e-4)
    assert [i for i, _ in found.top] == [i for i, _ in case["alternatives"]]


def test_logprobs_are_ordered_by_logits():
    """Two neighboring floats near 0 have one logprob near -4; the law orders by the logit."""
    logits = torch.zeros(60)
    logits[10] = 1e-3
    logits[40] = torch.nextafter(logits[10], torch.tensor(1.0))
    assert len(set(logits.log_softmax(-1)[[10, 40]].tolist())) == 1
    expected = law.token_logprob(logits.numpy(), 10, 2)
    assert [i for i, _ in logprob_of(logits, 10, 2).top] == [i for i, _ in expected.top] == [40, 10]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), choice=st.integers(0, 2**32 - 1), position=st.integers(0, 2**20))
def test_noise_is_the_laws(seed, choice, position):
    sampling = Sampling(seed=seed, choice=choice)
    ids = np.arange(37)
    theirs = law.gumbel(law.random_words(ids, position, seed, choice))
    ours = gumbel_noise(sampling, position, 37, CPU).numpy()
    np.testing.assert_allclose(ours, theirs, atol=4e-6)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_tokens_are_the_laws(data):
    """Random rows and parameters; a draw nearer to a tie than rounding allows is left out."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    size = data.draw(st.integers(2, 70))
    logits = (rng.normal(size=size) * data.draw(st.sampled_from([0.5, 3, 20]))).astype(np.float32)
    if data.draw(st.booleans()):
        logits = np.round(logits)  # ties
    sampling = Sampling(
        temperature=data.draw(st.sampled_from([0.0, 0.3, 1.0, 2.5])),
        top_k=data.draw(st.sampled_from([0, 1, 3, 200])),
        top_p=data.draw(st.sampled_from([1.0, 0.9, 0.3])),
        min_p=data.draw(st.sampled_from([0.0, 0.05, 0.7])),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.3, 0.8])),
        presence_penalty=data.draw(st.sampled_from([0.0, 0.7])),
        frequency_penalty=data.draw(st.sampled_from([0.0, -0.4])),
        seed=data.draw(st.integers(0, 2**64 - 1)),
    )
    history = rng.integers(0, size, data.draw(st.integers(1, 12))).tolist()
    prompt = data.draw(st.integers(1, len(history)))
    counts = law.TokenCounts.of(history, prompt, size)
    expected = law.sample_token(logits, sampling, len(history), counts)
    found, _ = sample_row(torch.from_numpy(logits), sampling, history, prompt, None)
    if found != expected:
        assert _is_near_tie(logits, sampling, counts, len(history), found, expected)


def _is_near_tie(logits, sampling, counts, position, first, second) -> bool:
    shaped = law.shape_logits(logits, sampling, counts)
    if sampling.temperature == 0:
        return False
    scaled = law.scale(shaped, sampling.temperature)
    noise = law.gumbel(law.random_words(np.arange(len(logits)), position, sampling.seed, sampling.choice))
    noisy = scaled + noise
    weights = np.sort(np.exp(scaled.astype(np.float64)))[::-1]
    edge = np.abs(weights.cumsum() / weights.sum() - sampling.top_p).min() < 1e-5
    return bool(abs(noisy[first] - noisy[second]) < 1e-5 or edge)


@pytest.mark.parametrize("bad", [[np.nan, 0, 1], [np.inf, 0, 1], [-np.inf] * 3])
def test_rows_that_are_not_finite_are_refused(bad):
    logits = np.array(bad, np.float32)
    assert sample_row(torch.from_numpy(logits), Sampling(), [0], 1, None) == (-1, None)
    with pytest.raises(NumericalError):
        law.sample_token(logits, Sampling(), 1)


def test_a_wrong_position_gives_other_tokens():
    """The negative control: the comparison above would notice noise of another position."""
    logits = torch.zeros(50)
    sampling = Sampling(seed=1)
    tokens = [sample_row(logits, sampling, [0] * n, 1, None)[0] for n in range(1, 20)]
    assert len(set(tokens)) > 5
