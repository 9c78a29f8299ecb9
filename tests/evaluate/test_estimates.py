"""Standard errors and intervals: against known values, and against how often they hold the truth."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from octavo.evaluate.estimates import RUN_TOKENS, Estimate, Share


def test_mean_and_error_of_runs():
    values = [*[1.0] * RUN_TOKENS, *[3.0] * RUN_TOKENS, *[2.0] * (RUN_TOKENS - 1)]
    found = Estimate.of(values)
    assert found.mean == statistics.fmean(values)
    assert found.standard_error == pytest.approx(statistics.stdev([1.0, 3.0]) / math.sqrt(2))


def test_too_little_text_has_no_error():
    assert Estimate.of([1.0] * (2 * RUN_TOKENS - 1)) == Estimate(1.0, None)
    assert Estimate.of([1.0]).interval95 is None
    assert Estimate.of([1.0]).exponential() == Estimate(math.e, None)


def test_the_exponential_carries_the_error_to_first_order():
    found = Estimate(2.0, 0.01).exponential()
    assert found.mean == math.exp(2.0)
    assert found.standard_error == pytest.approx((math.exp(2.01) - math.exp(1.99)) / 2, rel=1e-4)
    assert Estimate(1000.0, 1.0).exponential() == Estimate(math.inf, None)


def coverage(neighbors_alike: float, error_of):
    """How often the interval of 1,024 values around 0 holds 0, where each value keeps part of the last one."""
    source, hits = random.Random(1), 0
    for _ in range(400):
        values, last = [], 0.0
        for _ in range(1024):
            last = neighbors_alike * last + source.gauss(0, 1)
            values.append(last)
        low, high = error_of(values)
        hits += low <= 0 <= high
    return hits / 400


def test_the_interval_holds_the_mean_in_95_of_100_texts():
    assert 0.92 <= coverage(0.0, lambda values: Estimate.of(values).interval95) <= 0.98


def test_also_where_neighbors_are_alike_which_single_tokens_would_not_give():
    def by_single_tokens(values):
        reach = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
        mean = statistics.fmean(values)
        return mean - reach, mean + reach

    assert coverage(0.6, lambda values: Estimate.of(values).interval95) >= 0.9
    assert coverage(0.6, by_single_tokens) < 0.8


@pytest.mark.parametrize(
    ("hits", "tokens", "low", "high"),
    [(10, 10, 0.7225, 1.0), (0, 10, 0.0, 0.2775), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_interval(hits, tokens, low, high):
    """The last is the example of Newcombe (1998), Statistics in Medicine 17:857."""
    found = Share.of(hits, tokens)
    assert found.value == hits / tokens
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)
