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

MOST_GUESSES = 16


class PromptLookup:
    """Called with the prompt and the tokens generated so far, which only grow from one call to the next."""

    def __init__(self, *, longest: int = LONGEST_MATCH_TOKENS, shortest: int = SHORTEST_MATCH_TOKENS) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        self._follows: dict[tuple[int, ...], int] = {}
        """The last tokens of a match -> the position after its latest occurrence."""
        self._indexed = 0
        """How many tokens the matches in `_follows` end within."""

    def __call__(self, token_ids: Sequence[int]) -> Sequence[int]:
        """Guesses, the next token first; none where the last tokens never came before."""
        tokens = len(token_ids)
        # The last token is left for the next call, or the end of the text would match itself.
        for end in range(self._indexed + 1, tokens):
            for length in self._lengths:
                if end >= length:
                    self._follows[tuple(token_ids[end - length : end])] = end
        self._indexed = max(self._indexed, tokens - 1)
        for length in self._lengths:
            found = self._follows.get(tuple(token_ids[tokens - length :])) if tokens >= length else None
            if found is not None:
                # A match that reaches the end of the text repeats with this period.
                period = tokens - found
                return [token_ids[found + i % period] for i in range(MOST_GUESSES)]
        return ()
