"""The numpy law against docs/sampling.md read aloud in plain Python, against known answers and statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from octavo.engine.sampling import (
    TokenCounts,
    check_finite,
    gumbel,
    has_penalties,
    keep,
    philox4x32,
    random_words,
    sample_token,
    scale,
    shape_logits,
    token_logprob,
)
from octavo.errors import NumericalError
from octavo.runners.masks import unpack_mask
from octavo.types import Sampling

F = np.float32


# --- the law, the slow way -----------------------------------------------------------------------------


def naive_logits(logits, sampling, prompt, generated, allowed):
    """Steps 1 to 3, a token at a time."""
    shaped = []
    for token, logit in enumerate(logits):
        if sampling.repetition_penalty != 1 and token in (*prompt, *generated):
            penalty = F(sampling.repetition_penalty)
            logit = logit / penalty if logit > 0 else logit * penalty
        count = generated.count(token)
        if count:
            logit = F(logit - F(F(sampling.frequency_penalty) * F(count)))
            logit = F(logit - F(sampling.presence_penalty))
        logit = F(logit + F(dict(sampling.logit_bias).get(token, 0)))
        shaped.append(logit if allowed is None or allowed[token] else F(-math.inf))
    return shaped


def naive_distribution(shaped, sampling):
    """Steps 5 to 8 -> {id: probability}, and how close the nearest decision was."""
    order = sorted(range(len(shaped)), key=lambda token: (-shaped[token], token))
    order = [token for token in order if shaped[token] > -math.inf]
    best = shaped[order[0]]
    scaled = {token: float(F(F(shaped[token] - best) / F(sampling.temperature))) for token in order}
    if sampling.top_k:
        order = order[: sampling.top_k]
    closest = math.inf
    if sampling.top_p < 1:
        total = math.fsum(math.exp(scaled[token]) for token in order)
        kept, reached = [], 0.0
        for token in order:
            closest = min(closest, abs(reached - sampling.top_p))
            if reached >= sampling.top_p:
                break
            kept.append(token)
            reached += math.exp(scaled[token]) / total
        order = kept
    if sampling.min_p > 0:
        closest = min([closest, *(abs(math.exp(scaled[t]) - sampling.min_p) for t in order)])
        order = [token for token in order if math.exp(scaled[token]) >= sampling.min_p]
    total = math.fsum(math.exp(scaled[token]) for token in order)
    return {token: math.exp(scaled[token]) / total for token in order}, closest


logits_rows = st.lists(
    st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, -math.inf]),
        st.floats(-30, 30, width=32),
    ),
    min_size=1,
    max_size=40,
).filter(lambda row: max(row) > -math.inf)


@st.composite
def situations(draw):
    """logits [V], prompt and generated ids, allowed or None."""
    row = np.array(draw(logits_rows), dtype=F)
    ids = st.lists(st.integers(0, len(row) - 1), max_size=12)
    allowed = draw(st.none() | st.lists(st.booleans(), min_size=len(row), max_size=len(row)).map(np.array))
    return row, draw(ids), draw(ids), allowed


penalties = st.builds(
    Sampling,
    temperature=st.just(0.0),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.3, -2.0]),
    presence_penalty=st.sampled_from([0.0, 0.1, -1.5]),
    logit_bias=st.dictionaries(st.integers(0, 0), st.floats(-100, 100), max_size=1).map(
        lambda biases: tuple(biases.items())
    ),
)
filters = st.builds(
    Sampling,
    temperature=st.sampled_from([1.0, 0.3, 4.0, 1e-3]),
    top_k=st.integers(0, 45),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
    seed=st.integers(0, 2**64 - 1),
)


@given(situations(), penalties)
def test_penalties_bias_and_mask(situation, sampling):
    row, prompt, generated, allowed = situation
    before = row.copy()
    counts = TokenCounts.of([*prompt, *generated], len(prompt), len(row))
    shaped = shape_logits(row, sampling, counts, allowed)
    expected = naive_logits(row, sampling, prompt, generated, allowed)
    assert np.array_equal(shaped, np.array(expected, dtype=F))
    assert shaped.dtype == F
    assert np.array_equal(row, before), "the row is left as it was"
    if max(expected) == -math.inf:
        with pytest.raises(NumericalError):
            sample_token(row, sampling, 7, counts, allowed)
    else:
        greedy = sample_token(row, sampling, 7, counts, allowed)
        assert greedy == expected.index(max(expected)), "greedy: the first of the largest"


@given(logits_rows, filters)
def test_filters_keep_what_the_law_says(row, sampling):
    row = np.array(row, dtype=F)
    expected, closest = naive_distribution(list(row), sampling)
    assume(closest > 1e-6)
    scaled = scale(row, sampling.temperature)
    kept = keep(row, scaled, sampling)
    assert kept.tolist() == sorted(expected)
    assert sample_token(row, sampling, 3) in expected


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(top_k=3), [1, 3, 4]),
        (Sampling(top_k=4), [1, 2, 3, 4]),
        (Sampling(top_k=99), [0, 1, 2, 3, 4]),
        (Sampling(top_p=1e-9), [3]),
        (Sampling(top_p=0.5), [3]),
        (Sampling(top_p=0.6), [1, 3]),
        (Sampling(min_p=1.0), [3]),
        (Sampling(min_p=0.3), [1, 3, 4]),
        (Sampling(temperature=1e-5), [0, 1, 2, 3, 4]),
    ],
)
def test_filters_by_hand(sampling, kept):
    """Logits 0 3 2 4 3: ids in order are 3, 1, 4 (a tie with 1), 2, 0."""
    row = np.array([0, 3, 2, 4, 3], dtype=F)
    assert keep(row, scale(row, sampling.temperature), sampling).tolist() == kept


def test_top_p_stops_where_it_is_reached_exactly():
    row = np.zeros(4, dtype=F)
    assert keep(row, scale(row, 1.0), Sampling(top_p=0.5)).tolist() == [0, 1]


# --- noise ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, words):
    """Random123's kat_vectors, philox4x32 with 10 rounds."""
    counters = np.array([[int(word, 16) for word in counter.split()]] * 2, dtype=np.uint32)
    low, high = (int(word, 16) for word in key.split())
    expected = [int(word, 16) for word in words.split()]
    assert philox4x32(counters, (low, high)).tolist() == [expected, expected]


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=90, unique=True),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=50)
def test_a_tokens_noise_depends_on_nothing_but_itself(ids, position, seed, choice):
    """Counter and key as the law has them, whichever other ids are asked for, few or many."""
    words = random_words(np.array(ids), position, seed, choice)
    for token, word in zip(ids, words.tolist(), strict=True):
        counter = np.array([[token // 4, position, seed >> 32, 0]], dtype=np.uint32)
        assert word == philox4x32(counter, (seed % 2**32, choice))[0, token % 4]


def test_gumbel_at_its_ends():
    noise = gumbel(np.array([0, 1, 2**31, 2**32 - 1], dtype=np.uint32))
    exact = [-math.log(-math.log1p(-v)) for v in (0.5 * 2**-32, 1.5 * 2**-32, 0.5, 1 - 2**-24)]
    assert noise.dtype == F
    assert noise == pytest.approx(exact, abs=4e-6)
    assert len(set(gumbel(np.arange(100, dtype=np.uint32)).tolist())) == 100, "the upper tail is resolved"


def kolmogorov_smirnov(noise):
    """sqrt(n) times the largest distance to the standard Gumbel distribution; above 1.95 once in 1,000."""
    ordered = np.sort(noise.astype(np.float64))
    cumulative = np.exp(-np.exp(-ordered))
    steps = np.arange(len(ordered) + 1) / len(ordered)
    distance = max(np.abs(cumulative - steps[1:]).max(), np.abs(cumulative - steps[:-1]).max())
    return distance * math.sqrt(len(ordered))


def test_noise_is_gumbel():
    by_token = gumbel(random_words(np.arange(20_000), 5, 1, 0))
    by_position = np.array([gumbel(random_words(np.array([7]), p, 1, 0))[0] for p in range(4_000)])
    assert kolmogorov_smirnov(by_token) < 1.95
    assert kolmogorov_smirnov(by_position) < 1.95
    assert kolmogorov_smirnov(by_token * F(1.05)) > 1.95, "a scale 5 % off is noticed"


@pytest.mark.parametrize("other", [(6, 1, 0), (5, 2, 0), (5, 1 + 2**32, 0), (5, 1, 1)])
def test_noise_of_other_positions_seeds_and_choices_is_independent(other):
    ids = np.arange(20_000)
    first, second = gumbel(random_words(ids, 5, 1, 0)), gumbel(random_words(ids, *other))
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(len(ids))


# --- what is drawn ---------------------------------------------------------------------------------------


def chi_square_excess(counts, probabilities):
    """Chi-square statistic over its value at p = 1e-4 (Wilson-Hilferty); above 1 is a misfit."""
    tokens = [token for token, p in probabilities.items() if p > 0]
    assert set(counts) <= set(tokens), "a token of probability 0 was drawn"
    expected = np.array([probabilities[token] * sum(counts.values()) for token in tokens])
    drawn = np.array([counts.get(token, 0) for token in tokens])
    freedom = len(tokens) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    return float((((drawn - expected) ** 2) / expected).sum() / limit)


def draw(row, draws, situations_of, **sampling):
    counts = {}
    for number in range(draws):
        position, seed, choice = situations_of(number)
        token = sample_token(row, Sampling(seed=seed, choice=choice, **sampling), position)
        counts[token] = counts.get(token, 0) + 1
    return counts


ROW = np.array([0.3, -1.0, 2.0, 1.9, -math.inf, 0.0, 0.0, 1.2, -0.5], dtype=F)


@pytest.mark.parametrize(
    ("draws", "situations_of", "sampling"),
    [
        (20_000, lambda n: (n, 11, 0), {"temperature": 1.0}),
        (4_000, lambda n: (40, n * 0x9E3779B97F4A7C15 % 2**64, 0), {"temperature": 0.6, "top_k": 6}),
        (4_000, lambda n: (40, 11, n), {"temperature": 1.7, "top_p": 0.9, "min_p": 0.1}),
    ],
    ids=["by position", "by seed", "by choice"],
)
def test_draws_follow_the_distribution(draws, situations_of, sampling):
    probabilities, _ = naive_distribution(list(ROW), Sampling(**sampling))
    counts = draw(ROW, draws, situations_of, **sampling)
    assert chi_square_excess(counts, probabilities) < 1
    warmer = Sampling(**{**sampling, "temperature": 1.25 * sampling["temperature"]})
    off, _ = naive_distribution(list(ROW), warmer)
    assert chi_square_excess(counts, off) > 1, "a temperature 25 % off is noticed"


# --- the rest --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 9.9e-6])
def test_a_temperature_next_to_zero_is_greedy(temperature):
    row = np.array([1, 1 + 2**-20, 1 + 2**-20, 0], dtype=F)
    assert all(sample_token(row, Sampling(temperature, seed=seed), 4) == 1 for seed in range(50))


def test_tiny_and_huge_temperatures_do_not_overflow():
    row = np.array([300.0, 3e38, -3e38, 2.9e38], dtype=F)
    assert sample_token(row, Sampling(temperature=1e-5), 4) == 1
    assert 0 <= sample_token(row, Sampling(temperature=1e30), 4) < 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_with_nan_or_infinity_is_an_error(bad):
    row = np.array([0, 1, bad, 3], dtype=F)
    with pytest.raises(NumericalError, match="not finite"):
        check_finite(row)
    for sampling in (Sampling(), Sampling(temperature=0), Sampling(top_k=1)):
        with pytest.raises(NumericalError):
            sample_token(row, sampling, 4)
    hidden = np.array([True, True, False, True])
    with pytest.raises(NumericalError):
        sample_token(row, Sampling(), 4, allowed=hidden)


def test_nothing_left_is_an_error():
    with pytest.raises(NumericalError):
        check_finite(np.full(5, -np.inf, F))
    with pytest.raises(NumericalError):
        sample_token(np.zeros(5, F), Sampling(), 4, allowed=np.zeros(5, bool))
    sample_token(np.array([-np.inf, 0], F), Sampling(), 4)


@given(st.lists(st.booleans(), min_size=1, max_size=100))
def test_masks_unpack(bits):
    words = np.zeros(-(-len(bits) // 32), dtype=np.uint32)
    for token, bit in enumerate(bits):
        words[token // 32] |= np.uint32(bit << (token % 32))
    assert unpack_mask(words, len(bits)).tolist() == bits


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(0, 30))
def test_counts_grow_as_tokens_come(ids, prompt_tokens):
    prompt_tokens = min(prompt_tokens, len(ids))
    grown = TokenCounts.of(ids[:prompt_tokens], prompt_tokens, 10)
    for token in ids[prompt_tokens:]:
        grown.add(token)
    whole = TokenCounts.of(ids, prompt_tokens, 10)
    assert np.array_equal(grown.in_prompt, whole.in_prompt)
    assert np.array_equal(grown.generated, whole.generated)


def test_has_penalties_names_all_three():
    assert not has_penalties(Sampling(logit_bias=((1, 2.0),), top_k=3))
    for name, value in (("repetition_penalty", 1.1), ("frequency_penalty", 0.1), ("presence_penalty", -0.1)):
        assert has_penalties(Sampling(**{name: value}))


@given(logits_rows, st.data())
def test_logprobs(row, data):
    row = np.array(row, dtype=F)
    token = data.draw(st.integers(0, len(row) - 1))
    top = data.draw(st.integers(0, len(row) + 2))
    entry = token_logprob(row, token, top)
    finite = [float(value) for value in row if value > -math.inf]
    total = max(finite) + math.log(math.fsum(math.exp(value - max(finite)) for value in finite))
    assert entry.token_id == token
    assert entry.logprob == pytest.approx(float(row[token]) - total, rel=1e-6, abs=1e-6)
    assert entry.logprob == float(F(entry.logprob)), "an fp32 value"
    ids = sorted(range(len(row)), key=lambda i: (-row[i], i))[:top]
    assert [i for i, _ in entry.top] == ids
    assert all(value == pytest.approx(float(row[i]) - total, rel=1e-6, abs=1e-6) for i, value in entry.top)
    assert dict(entry.top).get(token, entry.logprob) == entry.logprob, "one value for one token"
