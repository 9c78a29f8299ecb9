"""Prompt lookup: guesses at the next tokens, from what followed the same few tokens earlier in the text.

Good where an answer repeats its prompt or itself: code edits, summaries, extraction, tables. One `PromptLookup`
follows one sequence. For every token of the text (the end of it, where it is very long), the prompt's too, it looks at
what it would have guessed, and so knows how likely a guess is before one costs anything. Work and memory are bounded.
Whether guesses are worth verifying, and how many, is the engine's business. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence

from octavo.engine.hooks import Guess

MOST_GUESSES = 8

CONTEXTS = (6, 3, 2, 1)
"""How many last tokens are looked up, longest first: the first that were seen before make the guess."""

_SURE_RUN = 2
"""After so many times the same token in a row, one time more says nothing new."""

_FIRST_CHANCES = {6: (0.3, 0.8, 0.95), 3: (0.25, 0.55, 0.8), 2: (0.25, 0.45, 0.6), 1: (0.1, 0.25, 0.4)}
"""Context -> how often it guesses right where another token followed the time before, where it was seen once, and
where the same token followed every time of late: about what 76 generated texts had (docs/log.md)."""
_FIRST_WEIGHT = 6.0
"""How many guesses those chances weigh,"""
_MOST_WEIGHT = 32.0
"""and how many of the latest guesses make a chance."""

_READ_AT_ONCE_TOKENS = 1024
"""Some 3 ms of a step: a longer prompt is read in several,"""
_MOST_READ_TOKENS = 8192
"""and only the end of a very long one: a token read takes about a kilobyte."""


class PromptLookup:
    """Called with the prompt and the tokens generated so far, which only grow from one call to the next."""

    def __init__(self) -> None:
        self._followers: dict[tuple[int, ...], tuple[int, int]] = {}
        """Tokens -> what followed them last, and how often in a row before (up to `_SURE_RUN`)."""
        self._chances = {context: list(chances) for context, chances in _FIRST_CHANCES.items()}
        self._weights = {context: [_FIRST_WEIGHT] * (_SURE_RUN + 1) for context in CONTEXTS}
        self._read = 0
        """How many tokens `_followers` knows; of a long text only what lies behind the first ones left out."""

    def __call__(self, token_ids: Sequence[int]) -> Sequence[Guess]:
        """Guesses, the next token first; none where the last token never came before."""
        self._read = max(self._read, len(token_ids) - _MOST_READ_TOKENS)
        until = min(len(token_ids), self._read + _READ_AT_ONCE_TOKENS)
        for end in range(self._read, until):
            self._learn(token_ids[max(end - CONTEXTS[0], 0) : end], token_ids[end])
        self._read = until
        text = list(token_ids[-CONTEXTS[0] :])
        guesses: list[Guess] = []
        while len(guesses) < MOST_GUESSES:
            guess = self._guess(text)
            if guess is None:
                break
            guesses.append(guess)
            text.append(guess.token_id)
        return guesses

    def _guess(self, text: Sequence[int]) -> Guess | None:
        """At what follows the last tokens of a text."""
        for context in CONTEXTS:
            found = self._followers.get(tuple(text[-context:])) if len(text) >= context else None
            if found is not None:
                token_id, run = found
                return Guess(token_id, self._chances[context][run])
        return None

    def _learn(self, before: Sequence[int], token_id: int) -> None:
        """`token_id` followed the last tokens of the text, `before`."""
        followers = self._followers
        guessed = False
        for context in CONTEXTS:
            if len(before) < context:
                continue
            last = tuple(before[-context:])
            found = followers.get(last)
            if found is None:
                followers[last] = (token_id, 1)
                continue
            follower, run = found
            right = follower == token_id
            if not guessed:  # a shorter context would not have been asked
                guessed = True
                weights, chances = self._weights[context], self._chances[context]
                weights[run] = min(weights[run] + 1, _MOST_WEIGHT)
                chances[run] += (right - chances[run]) / weights[run]
            if not right:
                followers[last] = (token_id, 0)
            elif run < _SURE_RUN:
                followers[last] = (token_id, run + 1)
