"""Stop strings against a plain search of the whole text."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.errors import InvalidParameterError
from octavo.text.stop_strings import StopStrings


def reference(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    found = [(text.find(stop), len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    start, _, stop = min(found)
    return text[:start], stop


def streamed(chunks: Iterable[str], stops: Sequence[str]) -> tuple[list[str], str | None]:
    """What was shown after each chunk, and the match."""
    machine, shown = StopStrings(stops), []
    for chunk in chunks:
        text, stop = machine.push(chunk)
        shown.append(text)
        if stop is not None:
            return shown, stop
    text, stop = machine.finish()
    return [*shown, text], stop


def cut(text: str, draw: random.Random) -> list[str]:
    chunks, position = [], 0
    while position < len(text):
        size = draw.randrange(0, 5)
        chunks.append(text[position : position + size])
        position += size
    return chunks


def test_ten_thousand_texts() -> None:
    draw = random.Random(3)
    matches = 0
    for _ in range(10_000):
        letters = draw.choice(["ab", "abc", "a", "aé😀"])
        stops = ["".join(draw.choices(letters, k=draw.randrange(1, 6))) for _ in range(draw.randrange(1, 5))]
        text = "".join(draw.choices(letters + "x", k=draw.randrange(0, 25)))
        shown, stop = streamed(cut(text, draw), stops)
        assert ("".join(shown), stop) == reference(text, stops), (text, stops)
        matches += stop is not None
    assert 2_000 < matches < 9_000  # both outcomes are well covered


@given(
    st.text("ab\n", max_size=30), st.lists(st.text("ab\n", min_size=1, max_size=6), max_size=4), st.randoms()
)
def test_any_text(text: str, stops: list[str], draw: random.Random) -> None:
    shown, stop = streamed(cut(text, draw), stops)
    assert ("".join(shown), stop) == reference(text, stops)


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=4))
def test_holds_back_no_more_than_it_must(text: str, stops: list[str]) -> None:
    """Held back, until a match: the longest suffix that starts a stop string."""
    machine, shown = StopStrings(stops), ""
    for position, character in enumerate(text, start=1):
        delta, stop = machine.push(character)
        shown += delta
        if stop is not None or any(other in text[:position] for other in stops):
            return
        seen = text[:position]
        held = max(
            size for size in range(position + 1) if any(s.startswith(seen[position - size :]) for s in stops)
        )
        assert shown == seen[: position - held]


def test_earliest_start_wins_over_earliest_end() -> None:
    """ "bc" is complete first, but "abcd" starts before it and is still growing."""
    assert streamed("xabcd", ["bc", "abcd"]) == (["x", "", "", "", ""], "abcd")
    assert streamed("xabce", ["bc", "abcd"]) == (["x", "", "", "", "a"], "bc")
    assert streamed("xabc", ["bc", "abcd"]) == (["x", "", "", "", "a"], "bc")


def test_of_two_that_start_together_the_shorter_wins() -> None:
    assert streamed(["abc"], ["abc", "ab"]) == ([""], "ab")


def test_a_match_across_chunks_shows_nothing_of_the_stop() -> None:
    assert streamed(["Hello\nUs", "er", ": hi"], ["\nUser:"]) == (["Hello", "", ""], "\nUser:")


def test_no_stops() -> None:
    assert streamed(["a", "b"], []) == (["a", "b", ""], None)


def test_empty_stop_is_refused() -> None:
    with pytest.raises(InvalidParameterError) as caught:
        StopStrings(["x", ""])
    assert caught.value.parameter == "stop"


def test_adversarial_stop_takes_linear_time() -> None:
    stop = "a" * 20_000 + "b"
    machine = StopStrings([stop])
    assert machine.push("a" * 100_000).text == "a" * 80_000
    assert machine.push("b").stop == stop
