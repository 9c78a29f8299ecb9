"""Strings that remember which of their characters a chat template wrote.

A template's own literals are `TemplateText`; message text is plain `str`. Joining, slicing and stripping keep
the account; every other string operation gives a plain `str`. So an account can only be lost, never gained:
text is taken for the template's own only where it provably is, and a message cannot forge it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import SupportsIndex

Span = tuple[int, int]
"""Characters [start, end)."""


class TemplateText(str):
    """A string and the spans of it that the template wrote, in order, disjoint and not adjacent."""

    __slots__ = ("spans",)
    spans: tuple[Span, ...]

    def __new__(cls, text: str, spans: tuple[Span, ...] | None = None) -> TemplateText:
        """`spans` None: all of it."""
        self = super().__new__(cls, text)
        self.spans = (((0, len(text)),) if text else ()) if spans is None else spans
        return self

    def wrote(self, start: int, end: int) -> bool:
        """Whether every character of [start, end) is the template's own."""
        before = bisect_right(self.spans, start, key=lambda span: span[0])
        return start == end or (before > 0 and end <= self.spans[before - 1][1])

    def __str__(self) -> TemplateText:
        return self

    def __add__(self, other: str) -> TemplateText:
        return joined((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> TemplateText:
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        text = super().__getitem__(key)
        if not isinstance(key, slice):
            return text
        start, end, step = key.indices(len(self))
        return self._part(text, start, end) if step == 1 else text

    def strip(self, chars: str | None = None, /) -> str:
        return self.rstrip(chars).lstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> str:
        text = super().lstrip(chars)
        return self._part(text, len(self) - len(text), len(self))

    def rstrip(self, chars: str | None = None, /) -> TemplateText:
        text = super().rstrip(chars)
        return self._part(text, 0, len(text))

    def _part(self, text: str, start: int, end: int) -> TemplateText:
        kept = ((max(first, start) - start, min(last, end) - start) for first, last in self.spans)
        return TemplateText(text, tuple((first, last) for first, last in kept if first < last))


def joined(parts: Iterable[str]) -> TemplateText:
    """ "".join(parts), with the account of each part; plain parts count as message text."""
    texts = list(parts)
    spans: list[Span] = []
    position = 0
    for text in texts:
        own = text.spans if isinstance(text, TemplateText) else ()
        for first, last in own:
            start, end = position + first, position + last
            if spans and spans[-1][1] == start:
                start = spans.pop()[0]
            spans.append((start, end))
        position += len(text)
    return TemplateText("".join(texts), tuple(spans))
