"""Provenance is kept by joining, slicing and stripping, and never gained by anything."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.text.provenance import TemplateText, joined

PARTS = st.lists(st.tuples(st.booleans(), st.text(" ab\n", max_size=4)), max_size=6)


def built(parts: list[tuple[bool, str]]) -> tuple[TemplateText, list[bool]]:
    """A text, and for each character whether the template wrote it."""
    text = joined(TemplateText(part) if own else part for own, part in parts)
    return text, [own for own, part in parts for _ in part]


def account(text: str) -> list[bool]:
    spans = text.spans if isinstance(text, TemplateText) else ()
    return [any(start <= i < end for start, end in spans) for i in range(len(text))]


@given(PARTS, PARTS)
def test_joining(left: list[tuple[bool, str]], right: list[tuple[bool, str]]) -> None:
    (a, own_a), (b, own_b) = built(left), built(right)
    assert (a + b, account(a + b)) == (str(a) + str(b), own_a + own_b)
    plain = str.__str__(b)
    assert account(a + plain) == own_a + [False] * len(b)
    assert account(plain + a) == [False] * len(b) + own_a
    spans = (a + b).spans
    assert all(x[1] < y[0] for x, y in pairwise(spans))
    assert all(start < end for start, end in spans)


@given(PARTS, st.sampled_from([None, " ", "a", "\n b"]))
def test_stripping(parts: list[tuple[bool, str]], chars: str | None) -> None:
    text, own = built(parts)
    plain = str.__str__(text)
    from_left = len(plain) - len(plain.lstrip(chars))
    assert (text.lstrip(chars), account(text.lstrip(chars))) == (plain.lstrip(chars), own[from_left:])
    to_right = len(plain.rstrip(chars))
    assert (text.rstrip(chars), account(text.rstrip(chars))) == (plain.rstrip(chars), own[:to_right])
    assert text.strip(chars) == plain.strip(chars)
    assert account(text.strip(chars)) == (own[:to_right][from_left:] if plain.strip(chars) else [])


@given(PARTS, st.slices(12))
def test_slicing(parts: list[tuple[bool, str]], part: slice) -> None:
    text, own = built(parts)
    assert text[part] == str.__str__(text)[part]
    assert account(text[part]) == (own[part] if part.step in (None, 1) else [False] * len(own[part]))


@given(PARTS, st.data())
def test_wrote(parts: list[tuple[bool, str]], data: st.DataObject) -> None:
    text, own = built(parts)
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    assert text.wrote(start, end) is all(own[start:end])


OPERATIONS: dict[str, Callable[[TemplateText], str]] = {
    "upper": lambda text: text.upper(),
    "replace": lambda text: text.replace("<", "<"),
    "format": "{}x".format,
    "f-string": lambda text: f"{text}x",
    "percent": lambda text: "%sx" % text,  # noqa: UP031
    "join": lambda text: text.join(["a", "b"]),
    "joined": lambda text: "".join([text, "x"]),
    "times": lambda text: text * 2,
    "split": lambda text: text.split("|")[0],
    "backwards": lambda text: text[::-1],
    "character": lambda text: text[0],
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_other_operations_lose_the_account(name: str) -> None:
    """Fails closed: what cannot be followed is taken for message text."""
    assert type(OPERATIONS[name](TemplateText("<|x|>"))) is str


def test_str_keeps_it() -> None:
    text = TemplateText("<|x|>") + "y"
    assert str(text) is text
    with pytest.raises(TypeError):
        text + 1  # type: ignore[operator]
