"""Prompt lookup against a plain search, and that it never looks twice at what it has seen."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.engine.drafting import MOST_GUESSES, STEADY_TOKENS, PromptLookup


def plain(tokens: list[int], longest: int, shortest: int) -> list[int]:
    """The latest earlier occurrence of the longest suffix, and what followed it, over and over, as far as it is
    steady."""
    for length in range(longest, shortest - 1, -1):
        suffix = tokens[-length:]
        for end in range(len(tokens) - 1, length - 1, -1):
            if len(suffix) == length and tokens[end - length : end] == suffix:
                followed = tokens[end:]
                guesses: list[int] = []
                for guess in (followed * MOST_GUESSES)[:MOST_GUESSES]:
                    if not steady(tokens, (tokens + guesses)[-STEADY_TOKENS:]):
                        break
                    guesses.append(guess)
                return guesses
    return []


def steady(tokens: list[int], last: list[int]) -> bool:
    """Whether the same token followed the two latest earlier occurrences."""
    ends = [end for end in range(STEADY_TOKENS, len(tokens)) if tokens[end - STEADY_TOKENS : end] == last]
    return len(ends) < 2 or tokens[ends[-1]] == tokens[ends[-2]]


@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(1, 7), max_size=12), st.integers(2, 4))
def test_guesses_are_those_of_a_plain_search_however_the_text_grows(
    tokens: list[int], growth: list[int], longest: int
) -> None:
    lookup, length = PromptLookup(longest=longest), 0
    for more in [*growth, len(tokens)]:
        length = min(length + more, len(tokens))
        seen = tokens[:length]
        assert list(lookup(seen)) == plain(seen, longest, 2)


def test_a_copied_text_is_foretold() -> None:
    passage = list(range(100, 140))
    lookup = PromptLookup()
    text = [*passage, 1, 2, *passage[:2]]
    assert list(lookup(text)) == passage[2 : 2 + MOST_GUESSES]


def test_new_text_has_no_guesses() -> None:
    lookup = PromptLookup()
    for length in range(50):
        assert not lookup(list(range(length)))


class Counted(list[int]):
    """Counts what is read of it."""

    read = 0

    def __getitem__(self, place: Any) -> Any:
        Counted.read += 1
        return super().__getitem__(place)


def test_a_token_costs_the_same_at_any_length() -> None:
    lookup, tokens = PromptLookup(), Counted()
    costs = []
    for token in range(4000):
        tokens.append(token * 7919 % 1009)
        Counted.read = 0
        lookup(tokens)
        costs.append(Counted.read)
    assert max(costs) <= 3 * STEADY_TOKENS + MOST_GUESSES
    assert max(costs[3000:]) <= max(costs[:1100]) + MOST_GUESSES


def test_it_keeps_neither_the_list_nor_changes_it() -> None:
    tokens: Sequence[int] = [1, 2, 3, 1, 2, 3]
    before, count = list(tokens), sys.getrefcount(tokens)
    lookup = PromptLookup()
    lookup(tokens)
    assert (list(tokens), sys.getrefcount(tokens)) == (before, count)


@pytest.mark.parametrize("tokens", [[], [5], [5, 5], [5, 5, 5]])
def test_short_texts(tokens: list[int]) -> None:
    assert list(PromptLookup()(tokens)) == plain(tokens, 3, 2)


def test_a_slot_where_lines_differ_is_not_guessed() -> None:
    lines = [[1, 2, 3, 4, 5, number, 6, 7] for number in (20, 21, 22)]
    text = [token for line in lines for token in line]
    assert list(PromptLookup()([*text, 1, 2, 3])) == [4, 5], "what follows was different each time"
    assert list(PromptLookup()([*text, 1, 2, 3, 4, 5, 23, 6, 7, 1, 2]))[:3] == [3, 4, 5]
