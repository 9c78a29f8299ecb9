"""Means over a text with their uncertainty.

Neighboring tokens are alike, so the standard error of a mean is taken from the means of runs of
`RUN_TOKENS` tokens, which are nearly independent, and not from single tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

RUN_TOKENS = 32
_NORMAL_95 = 1.959964
"""Standard deviations to either side that hold 95 % of a normal distribution."""


@dataclass(frozen=True, slots=True)
class Estimate:
    mean: float
    standard_error: float | None
    """None where fewer than two runs of tokens were seen."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Of one value a token, in the order of the text; at least one."""
        runs = [
            statistics.fmean(values[i : i + RUN_TOKENS])
            for i in range(0, len(values) - RUN_TOKENS + 1, RUN_TOKENS)
        ]
        error = statistics.stdev(runs) / math.sqrt(len(runs)) if len(runs) > 1 else None
        return cls(statistics.fmean(values), error)

    @property
    def interval95(self) -> tuple[float, float] | None:
        """What holds the mean over all such text in 95 of 100 cases."""
        if self.standard_error is None:
            return None
        reach = _NORMAL_95 * self.standard_error
        return self.mean - reach, self.mean + reach

    def exponential(self) -> Estimate:
        """exp of the mean, with the standard error carried through to first order: perplexity from its logarithm."""
        if self.mean > 709:  # beyond float64
            return Estimate(math.inf, None)
        value = math.exp(self.mean)
        return Estimate(value, None if self.standard_error is None else value * self.standard_error)


@dataclass(frozen=True, slots=True)
class Share:
    """A share of tokens with its 95 % Wilson interval, which stays in 0..1 also where the share is 1."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, hits: int, tokens: int) -> Self:
        """`tokens` at least 1."""
        p, z2 = hits / tokens, _NORMAL_95**2
        middle = (p + z2 / (2 * tokens)) / (1 + z2 / tokens)
        reach = _NORMAL_95 / (1 + z2 / tokens) * math.sqrt(p * (1 - p) / tokens + z2 / (4 * tokens**2))
        return cls(p, max(0.0, middle - reach), min(1.0, middle + reach))
