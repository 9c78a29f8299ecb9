"""Ends a text at the first stop string, across token borders, without showing any of it.

Each stop string is matched by its own Knuth-Morris-Pratt automaton: linear time whatever the texts, and the
automaton's state is exactly the length of the suffix that must be held back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from octavo.errors import InvalidParameterError


class StopResult(NamedTuple):
    text: str
    """New text that may be shown: no part of it belongs to the stop string that will match."""
    stop: str | None
    """The stop string that matched; the text ends here."""


class StopStrings:
    """For one sequence, from one thread.

    Of all matches in the whole text the one that starts first wins, and of those that start together the
    shortest: the same as `min(text.find(stop))`, however the text is cut.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises InvalidParameterError for an empty stop string. No stops: all text passes at once."""
        if "" in stops:
            raise InvalidParameterError(
                "a stop string is empty: it would match everywhere",
                remedy="Remove the empty --stop.",
                parameter="stop",
            )
        self._matchers = [_Matcher(stop) for stop in dict.fromkeys(stops)]
        self._seen = 0
        self._held = ""
        self._held_from = 0
        self._found: tuple[int, int, str] | None = None
        """(start, length, stop) of the winner, unless a match still growing starts before it."""

    def push(self, delta: str) -> StopResult:
        """Take more text; not to be called after a match."""
        self._held += delta
        for character in delta if self._matchers else "":
            self._seen += 1
            for matcher in self._matchers:
                if matcher.advance(character):
                    start = self._seen - len(matcher.stop)
                    found = (start, len(matcher.stop), matcher.stop)
                    self._found = found if self._found is None else min(self._found, found)
            if self._found is not None and self._growing_from() >= self._found[0]:
                return self._end()
        return StopResult(self._release(self._growing_from() if self._matchers else None), None)

    def finish(self) -> StopResult:
        """The text is over: release what was held back, up to a match that was not yet certain."""
        return StopResult(self._release(None), None) if self._found is None else self._end()

    def _growing_from(self) -> int:
        """Where the first match that may still complete starts; the end of the text if there is none."""
        return self._seen - max(matcher.matched for matcher in self._matchers)

    def _end(self) -> StopResult:
        assert self._found is not None
        start, _, stop = self._found
        return StopResult(self._release(start), stop)

    def _release(self, end: int | None) -> str:
        """Held text up to position `end` of the whole text; None: all of it."""
        count = len(self._held) if end is None else end - self._held_from
        text, self._held = self._held[:count], self._held[count:]
        self._held_from += count
        return text


class _Matcher:
    """Finds the first match of one stop string, a character at a time."""

    __slots__ = ("_borders", "_done", "matched", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        """Characters of `stop` that the text ends with, at most; 0 once it was found."""
        self._done = False
        # _borders[i]: length of the longest proper prefix of stop[: i + 1] that is also its suffix.
        self._borders = [0] * len(stop)
        for i in range(1, len(stop)):
            self._borders[i] = self._extended(self._borders[i - 1], stop[i])

    def advance(self, character: str) -> bool:
        """Whether the first match ends with this character."""
        if self._done:
            return False
        self.matched = self._extended(self.matched, character)
        if self.matched == len(self.stop):
            self._done, self.matched = True, 0
        return self._done

    def _extended(self, matched: int, character: str) -> int:
        while matched and self.stop[matched] != character:
            matched = self._borders[matched - 1]
        return matched + 1 if self.stop[matched] == character else 0
