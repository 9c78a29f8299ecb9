"""How many guesses are worth verifying for one sequence: more while they come true, none where they do not.

A refuted guess costs a row of a forward pass, so text that nothing predicts must find out quickly and stay
out of it. Standard library only.
"""

from __future__ import annotations

MAX_DRAFTS = 8
"""Most guesses verified for a sequence in a step."""
_FIRST_DRAFTS = 2
_FIRST_REST_TOKENS = 32
_LONGEST_REST_TOKENS = 512


class Speculation:
    """Twice as many guesses after a step whose guesses were all right, one more than were right after one that was
    partly wrong. After one that was all wrong half as many, and below one a rest, each twice as long as the
    last, then one guess again."""

    __slots__ = ("_drafts", "_rest_tokens", "_resting_until")

    def __init__(self) -> None:
        self._drafts = _FIRST_DRAFTS
        self._rest_tokens = _FIRST_REST_TOKENS
        self._resting_until = 0

    def drafts(self, tokens: int) -> int:
        """How many guesses to verify at a length of `tokens`."""
        return self._drafts if tokens >= self._resting_until else 0

    def observe(self, tokens: int, proposed: int, accepted: int) -> None:
        """A step came back, and the sequence is `tokens` long now."""
        if accepted:
            self._rest_tokens = _FIRST_REST_TOKENS
            doubled = max(2 * proposed, self._drafts) if accepted == proposed else accepted + 1
            self._drafts = min(doubled, MAX_DRAFTS)
        elif self._drafts > 1:
            self._drafts //= 2
        else:
            self._resting_until = tokens + self._rest_tokens
            self._rest_tokens = min(2 * self._rest_tokens, _LONGEST_REST_TOKENS)

    def stop(self) -> None:
        """Never again: the drafter failed."""
        self._drafts = 0
