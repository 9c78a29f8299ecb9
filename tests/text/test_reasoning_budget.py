"""A budget of reasoning: the end is forced when it is due, never in the middle of a character, and only then."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.text.reasoning_budget import ReasoningBudget

V = 300
END = b"\n</think>\n\n"


def spell(token: int) -> bytes:
    """Tokens below 256 are bytes; two more are the markers."""
    return {256: b"<think>", 257: b"</think>"}.get(token, bytes([token]) if token < 256 else b"")


def run(
    wanted: list[int], tokens: int, *, opened: bool, closing=(10, 257, 10), inner=None
) -> tuple[bytes, int]:
    """What a model writes that wants these tokens, and how many of them were forced."""
    budget = ReasoningBudget(inner, tokens=tokens, opened=opened, closing=closing, spell=spell, vocab_size=V)
    text, forced, wants = b"", 0, list(wanted)
    while wants or forced % len(closing):
        mask = budget.mask()
        if mask is None:
            token = wants.pop(0)
        else:
            assert mask.shape == ((V + 31) // 32,)
            (token,) = (i for i in range(V) if mask[i // 32] >> np.uint32(i % 32) & 1)
            forced += 1
        budget.accept(token)
        text += spell(token)
    return text, forced


@settings(deadline=None)
@given(st.text(max_size=40), st.integers(0, 60), st.booleans())
def test_the_block_has_its_tokens_and_no_more(thought, tokens, opened):
    if "<" in thought:
        return
    wanted = [*([] if opened else [256]), *thought.encode(), 257, *b"Yes."]
    text, forced = run(wanted, tokens, opened=opened)
    block = text.removeprefix(b"<think>").partition(b"</think>")[0]
    if len(thought.encode()) + 1 <= tokens:
        assert forced == 0
        assert text.removeprefix(b"<think>") == thought.encode() + b"</think>Yes."
    else:
        # A character that was begun is ended first; the newline before the marker is forced.
        assert tokens <= len(block.removesuffix(b"\n")) <= tokens + 3 or forced == 0
        assert thought.startswith(block.removesuffix(b"\n").decode())
        assert text.count(b"</think>") >= 1


@pytest.mark.parametrize("marker", [[257], list(b"</think>")])
@pytest.mark.parametrize("tokens", [0, 3])
def test_markers_as_tokens_or_as_text(marker, tokens):
    closing = (10, *marker, 10, 10)
    text, forced = run(list(b"thinking on and on"), tokens, opened=True, closing=closing)
    assert text == b"thinking on and on"[:tokens] + END + b"thinking on and on"[tokens:]
    assert forced == len(closing)


def test_an_end_that_the_model_writes_itself_is_seen():
    for end in ([257], list(b"</think>")):
        text, forced = run([*b"hm", *end, *b"a long answer that is no thought"], 12, opened=True)
        assert forced == 0
        assert text == b"hm</think>a long answer that is no thought"


@pytest.mark.parametrize("wanted", [list(b"No thought, an answer at once"), list(b" \n"), list(b"<thin air")])
def test_an_answer_without_reasoning_is_left_alone(wanted):
    assert run(wanted, 0, opened=False) == (bytes(wanted), 0)


def test_a_block_that_the_model_opens_is_closed():
    for begin in ([256], list(b"<think>"), list(b"\n <think>")):
        text, forced = run([*begin, *b"on and on"], 2, opened=False)
        assert text == b"".join(map(spell, begin)) + b"on\n</think>\n and on"
        assert forced == 3


class Inner:
    finished = False

    def __init__(self):
        self.seen = []

    def mask(self):
        return None

    def accept(self, token_id):
        self.seen.append(token_id)


def test_the_inner_constraint_sees_every_token():
    inner = Inner()
    run(list(b"abcdef"), 2, opened=True, inner=inner)
    assert inner.seen == [*b"ab", 10, 257, 10, *b"cdef"]
