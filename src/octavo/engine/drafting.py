"""Prompt lookup: guesses at the next tokens, from what followed the same few tokens earlier in the text.

Good where an answer repeats its prompt or itself: code edits, summaries, extraction, tables. One `PromptLookup`
follows one sequence, and does a bounded amount of work for each new token however long the text is. Whether
guesses are worth verifying, and how many, is the engine's business. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_MATCH_TOKENS = 3
SHORTEST_MATCH_TOKENS = 2
"""A single token that came before says little of what follows it: a refuted guess costs a row of a forward pass."""

STEADY_TOKENS = 4
"""After so many tokens, which twice were followed by different ones, nothing is guessed: where the lines of a list
have their number, what followed last time is no guess at what follows now."""

MOST_GUESSES = 16


class PromptLookup:
    """Called with the prompt and the tokens generated so far, which only grow from one call to the next."""

    def __init__(self, *, longest: int = LONGEST_MATCH_TOKENS, shortest: int = SHORTEST_MATCH_TOKENS) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        self._follows: dict[tuple[int, ...], int] = {}
        """The last tokens of a match -> the position after its latest occurrence."""
        self._next: dict[tuple[int, ...], int] = {}
        """STEADY_TOKENS tokens -> what followed them last."""
        self._unsteady: set[tuple[int, ...]] = set()
        """Those of them that were followed by something else the time before."""
        self._indexed = 0
        """How many tokens the matches in `_follows` end within."""

    def __call__(self, token_ids: Sequence[int]) -> Sequence[int]:
        """Guesses, the next token first; none where the last tokens never came before."""
        tokens = len(token_ids)
        # The last token is left for the next call, or the end of the text would match itself.
        for end in range(self._indexed + 1, tokens):
            self._index(token_ids, end)
        self._indexed = max(self._indexed, tokens - 1)
        for length in self._lengths:
            found = self._follows.get(tuple(token_ids[tokens - length :])) if tokens >= length else None
            if found is not None:
                return self._copy(token_ids, found)
        return ()

    def _index(self, token_ids: Sequence[int], end: int) -> None:
        for length in self._lengths:
            if end >= length:
                self._follows[tuple(token_ids[end - length : end])] = end
        if end >= STEADY_TOKENS:
            before, after = tuple(token_ids[end - STEADY_TOKENS : end]), token_ids[end]
            if self._next.setdefault(before, after) == after:
                self._unsteady.discard(before)
            else:
                self._unsteady.add(before)
                self._next[before] = after

    def _copy(self, token_ids: Sequence[int], start: int) -> Sequence[int]:
        """What followed a match, as far as it is steady. A match that reaches the end of the text repeats."""
        period = len(token_ids) - start
        copied = list(token_ids[-STEADY_TOKENS:])
        for i in range(MOST_GUESSES):
            if tuple(copied[-STEADY_TOKENS:]) in self._unsteady:
                break
            copied.append(token_ids[start + i % period])
        return copied[min(STEADY_TOKENS, len(token_ids)) :]
