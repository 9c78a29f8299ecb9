"""Guesses for one sequence, and how many are worth verifying: as many as pay, within what may be lost.

A row to verify costs a share of a step, which a guess that comes true saves whole. Of that account only a fixed
share of the tokens may be lost, so text that nothing predicts costs next to nothing. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence

from octavo.engine.hooks import Drafter, Guess

_COSTS_ALONE = (0.0, 0.45, 1.0, 1.05, 1.55, 2.0, 2.45, 2.65, 3.0)
"""What so many rows more add to a step of one row, as a share of it: measured on one AVX2 thread, where a block takes
four rows in the time of three (docs/log.md)."""

MAX_DRAFTS = len(_COSTS_ALONE) - 1
"""Most guesses verified for a sequence in a step."""

_ROW_COST = 0.45
"""The same for a row, where several sequences make the step's blocks whole or not."""

_FIRST_CREDIT = 0.5
"""Steps that may be lost to find out whether guesses come true, or one guess,"""
_CREDIT_SHARE = 0.01
"""and steps for each token that was generated since."""
_MOST_CREDIT = 4.0
"""Of steps won, what may be lost again."""

_LEAST_GAIN = 1.05
"""Guesses are to give so many times the tokens a step's time would give without: chances are estimates."""
_LOW_CREDIT = 1.0
_LEAST_GAIN_AT_LOW_CREDIT = 1.2
"""A wrong guess would end all guessing for a while: better ones may come."""


def cost(guesses: int, sequences: int) -> float:
    """What guesses of one sequence cost where so many decode, in units of what a token costs that is not guessed.
    `guesses` up to `MAX_DRAFTS`."""
    if sequences == 1:
        return _COSTS_ALONE[guesses]
    return guesses * sequences * _ROW_COST / (1 + (sequences - 1) * _ROW_COST)


def may_pay(sequences: int) -> bool:
    """Whether guesses that are all right are worth their rows, where so many sequences decode."""
    return _LEAST_GAIN * (1 + cost(MAX_DRAFTS, sequences)) < 1 + MAX_DRAFTS


class Speculation:
    __slots__ = ("_credit", "_drafter", "_tokens")

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self._credit = _FIRST_CREDIT
        self._tokens = 0
        """How long the sequence was when the credit was counted."""

    def guesses(self, token_ids: Sequence[int], most: int, sequences: int) -> tuple[int, ...]:
        """At most `most` guesses at what follows, where `sequences` decode; none while it is not worth it. Raises
        what the drafter raises."""
        least = cost(1, sequences)
        if self._tokens:
            self._earn(_CREDIT_SHARE * (len(token_ids) - self._tokens))
        else:
            self._credit = max(self._credit, least)
        self._tokens = len(token_ids)
        if most <= 0 or self._credit < least:
            return ()
        guesses = self._drafter(token_ids)
        return tuple([guess.token_id for guess in guesses[: self._worthwhile(guesses[:most], sequences)]])

    def observe(self, proposed: int, accepted: int, sequences: int) -> None:
        """A step came back: so many of the guesses were right."""
        self._earn(accepted - cost(proposed, sequences))

    def _earn(self, steps: float) -> None:
        self._credit = min(self._credit + steps, _MOST_CREDIT)

    def _worthwhile(self, guesses: Sequence[Guess], sequences: int) -> int:
        """The number of guesses that gives most tokens for what the step costs."""
        best, best_gain = 0, _LEAST_GAIN_AT_LOW_CREDIT if self._credit < _LOW_CREDIT else _LEAST_GAIN
        tokens = chance = 1.0
        for count, guess in enumerate(guesses[:MAX_DRAFTS], 1):
            price = cost(count, sequences)
            if price > self._credit:
                break
            chance *= guess.chance
            tokens += chance
            gain = tokens / (1 + price)
            if gain > best_gain:
                best, best_gain = count, gain
        return best
