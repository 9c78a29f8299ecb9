"""What one rendering of a chat template may cost: steps, seconds, and the size of any value it makes.

A template comes with the model and may be hostile; the sandbox keeps it from the machine, these limits keep it
from burning time and memory. They bound what a template can do step by step. What they cannot bound is a
single step of the interpreter that is slow by itself (comparing deeply nested lists, say): for that, rendering
must move into a process that can be killed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MAX_STEPS = 1_000_000
"""Loop rounds and calls; real templates need a few hundred for each message."""
MAX_SECONDS = 2.0
MAX_ITEMS = 1_000_000
"""Elements of a list, and of everything nested in it."""
MAX_WIDTH = 10_000
"""Padding and indentation, in characters."""
MAX_INTEGER_BITS = 4096
BASE_CHARACTERS = 1 << 20
CHARACTERS_FOR_EACH_OF_INPUT = 4
"""A text may grow to 1 Mi characters, and 4 for each character of the messages."""
TOTAL_SHARE = 64
"""All texts together, also those that are dropped again, may be this many times as long."""

_PADDING_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
_REFUSED_METHODS = frozenset({"translate"})
_WIDE_FORMAT = re.compile(r"\d{5}|\*|\{[^{}]*\{")
"""A width of 5 digits, or one that is computed."""


class TemplateLimitError(Exception):
    """A template exceeded a limit; the message says which."""


class RenderBudget:
    """The limits of one rendering."""

    def __init__(self, input_characters: int) -> None:
        self._steps = MAX_STEPS
        self._deadline = time.monotonic() + MAX_SECONDS
        self.max_characters = BASE_CHARACTERS + CHARACTERS_FOR_EACH_OF_INPUT * input_characters
        self._total = TOTAL_SHARE * self.max_characters

    def step(self) -> None:
        self._steps -= 1
        if self._steps < 0:
            raise TemplateLimitError(f"takes more than {MAX_STEPS:,} steps")
        if time.monotonic() > self._deadline:
            raise TemplateLimitError(f"takes more than {MAX_SECONDS:g} seconds")

    def counted(self, values: Iterable[Any]) -> Iterator[Any]:
        """The same values, each a step."""
        for value in values:
            self.step()
            yield value

    def length(self, count: int) -> None:
        """Check the length of one text."""
        if count > self.max_characters:
            raise TemplateLimitError(f"makes a text of {count:,} characters (limit {self.max_characters:,})")

    def characters(self, count: int) -> None:
        """Check the length of a text that is about to be made."""
        self.length(count)
        self._total -= count
        if self._total < 0:
            raise TemplateLimitError(
                f"makes texts of more than {TOTAL_SHARE * self.max_characters:,} characters"
            )

    def value(self, value: Any) -> None:
        """Check a value before it is turned into text, however deeply it is nested or shared."""
        pending, items = [value], 0
        while pending:
            item = pending.pop()
            if isinstance(item, str):
                self.length(len(item))
                items += len(item) // 64
            elif isinstance(item, int):
                _check_integer(item.bit_length())
            elif isinstance(item, Mapping):
                pending += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple | set | frozenset):
                pending += item
            items += 1
            if items > MAX_ITEMS:
                raise TemplateLimitError(f"makes a value of more than {MAX_ITEMS:,} parts")

    def operation(self, operator: str, left: Any, right: Any) -> None:
        """Check a binary operation before it is carried out."""
        self.step()
        match operator:
            case "+":
                self._sequence(_length(left) + _length(right), left)
            case "*":
                for sequence, factor in ((left, right), (right, left)):
                    if isinstance(factor, int):
                        self._sequence(_length(sequence) * max(0, factor), sequence)
                if isinstance(left, int) and isinstance(right, int):
                    _check_integer(left.bit_length() + right.bit_length())
            case "**":
                if isinstance(left, int) and isinstance(right, int):
                    _check_integer(left.bit_length() * abs(right))
            case "%":
                if isinstance(left, str):
                    _check_format(left)
                    self.value(right)

    def call(self, function: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
        """Check a call before it is made. Returns its arguments, with an iterator to be joined as a list."""
        self.step()
        method = getattr(function, "__wrapped__", function)  # Jinja wraps str.format
        text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if not isinstance(text, str):
            return arguments
        if name in _REFUSED_METHODS:
            raise TemplateLimitError(f"calls {name}() on a text")
        if name in _PADDING_METHODS:
            self.padding([*arguments, *named.values()])
        elif name in {"format", "format_map"}:
            self.formatting(text, [*arguments, *named.values()])
        elif name == "replace":
            self.replacement(text, *arguments[:2])
        elif name == "join" and len(arguments) == 1:
            return (self.joinable(text, arguments[0]),)
        return arguments

    def padding(self, arguments: Iterable[Any]) -> None:
        widths = [width for width in arguments if isinstance(width, int)]
        if any(abs(width) > MAX_WIDTH for width in widths):
            raise TemplateLimitError(
                f"pads a text to {max(widths, key=abs):,} characters (limit {MAX_WIDTH:,})"
            )

    def replacement(self, text: str, old: Any = "", new: Any = "") -> None:
        if isinstance(old, str) and isinstance(new, str):
            self.characters(len(text) + text.count(old) * max(0, len(new) - len(old)))

    def joinable(self, separator: str, parts: Iterable[Any]) -> list[Any]:
        """The parts, as a list."""
        items = list(parts)
        self.value(items)
        self.characters(sum(_length(item) for item in items) + len(separator) * max(0, len(items) - 1))
        return items

    def formatting(self, template: Any, arguments: Iterable[Any]) -> None:
        if isinstance(template, str):
            _check_format(template)
        self.value(list(arguments))

    def summing(self, start: Any) -> None:
        if not isinstance(start, int | float):
            raise TemplateLimitError("sums values that are not numbers")

    def _sequence(self, length: int, sequence: Any) -> None:
        if isinstance(sequence, str):
            self.characters(length)
        elif length > MAX_ITEMS:
            raise TemplateLimitError(f"makes a list of {length:,} elements (limit {MAX_ITEMS:,})")
        elif isinstance(sequence, list | tuple):
            self.characters(length)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _check_integer(bits: int) -> None:
    if bits > MAX_INTEGER_BITS:
        raise TemplateLimitError(f"makes a number of {bits:,} bits (limit {MAX_INTEGER_BITS:,})")


def _check_format(template: str) -> None:
    if (found := _WIDE_FORMAT.search(template)) is not None:
        raise TemplateLimitError(f"formats with a width of {found[0]!r}")
