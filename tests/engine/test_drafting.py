"""Prompt lookup against a plain search and a plain count, and that it never looks twice at what it has seen."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.engine.drafting import CONTEXTS, MOST_GUESSES, PromptLookup


def plain(tokens: list[int]) -> list[int]:
    """What followed the latest earlier occurrence of the longest of the contexts, over and over."""
    text = list(tokens)
    while len(text) < len(tokens) + MOST_GUESSES:
        found = seen(tokens, text)
        if found is None:
            break
        text.append(found[0])
    return text[len(tokens) :]


def seen(tokens: list[int], text: list[int]) -> tuple[int, int, int] | None:
    """What followed the last tokens of `text` in `tokens`: the token, the context, how often in a row before."""
    for context in CONTEXTS:
        last = text[-context:]
        ends = [end for end in range(context, len(tokens)) if tokens[end - context : end] == last]
        if len(last) == context and ends:
            followers = [tokens[end] for end in ends]
            run = next((i for i, f in enumerate(reversed(followers)) if f != followers[-1]), len(followers))
            changed = run < len(followers)
            return followers[-1], context, min(run - changed, 2)
    return None


def token_ids(lookup: PromptLookup, tokens: Sequence[int]) -> list[int]:
    return [guess.token_id for guess in lookup(tokens)]


@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(1, 7), max_size=12))
def test_guesses_are_those_of_a_plain_search_however_the_text_grows(
    tokens: list[int], growth: list[int]
) -> None:
    lookup, length = PromptLookup(), 0
    for more in [*growth, len(tokens)]:
        length = min(length + more, len(tokens))
        assert token_ids(lookup, tokens[:length]) == plain(tokens[:length])


@given(st.lists(st.integers(0, 2), min_size=20, max_size=80))
def test_a_chance_moves_with_what_came_of_such_guesses(tokens: list[int]) -> None:
    lookup = PromptLookup()
    for end in range(2, len(tokens)):
        guess, *_ = [*lookup(tokens[:end]), None]
        kind = seen(tokens[:end], tokens[:end])
        if guess is None or kind is None:
            assert guess is None
            assert kind is None
            continue
        lookup(tokens[: end + 1])
        after = _chance(lookup, kind)
        assert (after > guess.chance) == (tokens[end] == guess.token_id)
        assert 0 < after < 1


def _chance(lookup: PromptLookup, kind: tuple[int, int, int]) -> float:
    return lookup._chances[kind[1]][kind[2]]


def test_a_copied_text_is_foretold() -> None:
    passage = list(range(100, 140))
    text = [*passage, 1, 2, *passage[:2]]
    assert token_ids(PromptLookup(), text) == passage[2 : 2 + MOST_GUESSES]


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
    assert max(costs) <= 3, "what precedes, the token, the end of the text"


def test_it_keeps_neither_the_list_nor_changes_it() -> None:
    tokens: Sequence[int] = [1, 2, 3, 1, 2, 3]
    before, count = list(tokens), sys.getrefcount(tokens)
    lookup = PromptLookup()
    lookup(tokens)
    assert (list(tokens), sys.getrefcount(tokens)) == (before, count)


@pytest.mark.parametrize("tokens", [[], [5], [5, 5], [5, 5, 5]])
def test_short_texts(tokens: list[int]) -> None:
    assert token_ids(PromptLookup(), tokens) == plain(tokens)


def test_where_lines_differ_is_known_to_be_unlikely() -> None:
    lines = [[1, 2, 3, 4, 5, 6, 7, number] for number in range(20, 30)]
    text = [token for line in lines for token in line]
    likely = {guess.token_id: guess.chance for guess in PromptLookup()([*text, 1, 2, 3])}
    assert list(likely)[:4] == [4, 5, 6, 7]
    assert likely[29] < 0.2, "another number each time"
    assert min(likely[token] for token in (4, 5, 6, 7)) > 0.9


def test_a_long_text_is_read_in_several_calls_and_only_its_end():
    lookup = PromptLookup()
    text = [1, 2, 3, *range(100, 20_000), 1, 2]
    for _ in range(20):
        guesses = lookup(text)
    assert guesses == []  # what followed at the beginning is not known
    assert len(lookup._followers) < 4 * 9000
    text = [*range(100, 3000), 1, 2, 3, *range(3000, 3100), 1, 2]
    lookup = PromptLookup()
    assert lookup(text) == []
    assert [lookup(text) for _ in range(3)][-1][0].token_id == 3
