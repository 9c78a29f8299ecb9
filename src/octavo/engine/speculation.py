"""Guesses for one sequence, and how many are worth verifying: more while they come true, none where they do not.

A refuted guess costs a row of a forward pass, so text that nothing predicts must find out quickly and stay
out of it. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence

from octavo.engine.hooks import Drafter

MAX_DRAFTS = 8
"""Most guesses verified for a sequence in a step."""
_FIRST_DRAFTS = 2
_FIRST_REST_TOKENS = 32
_LONGEST_REST_TOKENS = 512


class Speculation:
    """Twice as many guesses after a step whose guesses were all right, one more than were right after one where half
    of them were: a row to verify costs about half a step. After any other half as many, and below one a rest, each
    twice as long as the last, then one guess again."""

    __slots__ = ("_drafter", "_most", "_rest_tokens", "_resting_until")

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self._most = _FIRST_DRAFTS
        self._rest_tokens = _FIRST_REST_TOKENS
        self._resting_until = 0

    def guesses(self, token_ids: Sequence[int], most: int) -> tuple[int, ...]:
        """At most `most` guesses at what follows; none while it is not worth it. Raises what the drafter raises."""
        most = min(most, self._most)
        if most <= 0 or len(token_ids) < self._resting_until:
            return ()
        return tuple(self._drafter(token_ids)[:most])

    def observe(self, tokens: int, proposed: int, accepted: int) -> None:
        """A step came back, and the sequence is `tokens` long now."""
        if accepted and 2 * accepted >= proposed:
            self._rest_tokens = _FIRST_REST_TOKENS
            more = max(2 * proposed, self._most) if accepted == proposed else accepted + 1
            self._most = min(more, MAX_DRAFTS)
        elif self._most > 1:
            self._most //= 2
        else:
            self._resting_until = tokens + self._rest_tokens
            self._rest_tokens = min(2 * self._rest_tokens, _LONGEST_REST_TOKENS)
