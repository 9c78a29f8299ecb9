"""Guesses for one sequence, and how many are worth verifying: as many as pay, within what may be lost.

A row to verify costs a share of a step, which a guess that comes true saves whole. Of that account only a fixed
share of the tokens may be lost, so text that nothing predicts costs next to nothing. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence

from octavo.engine.hooks import Drafter

MAX_DRAFTS = 8
"""Most guesses verified for a sequence in a step."""

ROW_COST = 0.45
"""What a row more adds to a step of one, as a share of it: 0.36 to 0.53 measured on one AVX2 thread (docs/log.md)."""

_FIRST_CREDIT = 1.0
"""Steps that may be lost to find out whether guesses come true,"""
_CREDIT_SHARE = 0.015
"""and steps for each token that was generated since."""
_MOST_CREDIT = 4.0
"""Of steps won, what may be lost again."""
_MEMORY = 0.9
"""What a guess weighs in the estimate, with each that came after it."""


def row_cost(sequences: int) -> float:
    """What a guess costs where so many sequences decode, in units of what a token costs that is not guessed."""
    return sequences * ROW_COST / (1 + (sequences - 1) * ROW_COST)


class Speculation:
    __slots__ = ("_credit", "_drafter", "_right", "_tested", "_tokens")

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self._right, self._tested = 1.0, 2.0
        """Guesses that came true of those the model had its say on, weighted: half of them before there are any."""
        self._credit = _FIRST_CREDIT
        self._tokens = 0
        """How long the sequence was when the credit was counted."""

    def guesses(self, token_ids: Sequence[int], most: int, cost: float) -> tuple[int, ...]:
        """At most `most` guesses at what follows; none while it is not worth it. `cost`: `row_cost` now. Raises what
        the drafter raises."""
        if self._tokens:
            self._earn(_CREDIT_SHARE * (len(token_ids) - self._tokens))
        self._tokens = len(token_ids)
        most = min(most, max(self._worthwhile(cost), 1), int(self._credit / cost))
        return tuple(self._drafter(token_ids)[:most]) if most > 0 else ()

    def observe(self, proposed: int, accepted: int, cost: float) -> None:
        """A step came back. Those after the first wrong guess say nothing of how good guesses are."""
        self._earn(accepted - cost * proposed)
        tested = min(accepted + 1, proposed)
        kept = _MEMORY**tested
        self._right = kept * self._right + accepted
        self._tested = kept * self._tested + tested

    def _earn(self, steps: float) -> None:
        self._credit = min(self._credit + steps, _MOST_CREDIT)

    def _worthwhile(self, cost: float) -> int:
        """The number of guesses that gives most tokens for what the step costs, each as likely as those before."""
        likely = self._right / self._tested
        best, best_rate = 0, 1.0
        tokens = chance = 1.0
        for count in range(1, MAX_DRAFTS + 1):
            chance *= likely
            tokens += chance
            rate = tokens / (1 + cost * count)
            if rate > best_rate:
                best, best_rate = count, rate
        return best
