"""Trimming a chat to a budget, against the same by trial of every cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.errors import ContextLengthError
from octavo.text.chat_history import trim_history
from octavo.types import Message


def tokens(messages: Sequence[Message]) -> int:
    return 3 + sum(2 + len(message["content"]) for message in messages)


@st.composite
def chats(draw: st.DrawFn) -> list[Message]:
    roles = ["system"] * draw(st.integers(0, 2)) + ["assistant"] * draw(st.integers(0, 1))
    for _ in range(draw(st.integers(0, 8))):
        roles += ["user"] + ["assistant"] * draw(st.integers(0, 2))
    return [{"role": role, "content": "x" * draw(st.integers(0, 20))} for role in [*roles, "user"]]


@given(chat=chats(), budget=st.integers(0, 300))
def test_drops_as_few_turns_as_possible(chat: list[Message], budget: int) -> None:
    system = [message for message in chat if message["role"] == "system"]
    rest = chat[len(system) :]
    cuts = [0, *(i for i in range(1, len(rest)) if rest[i]["role"] == "user")]
    fitting = [cut for cut in cuts if tokens(system + rest[cut:]) <= budget]
    if not fitting:
        with pytest.raises(ContextLengthError) as caught:
            trim_history(chat, budget, tokens)
        assert caught.value.prompt_tokens == tokens(system + rest[cuts[-1] :])
        assert caught.value.context_tokens == budget
        return
    trimmed = trim_history(chat, budget, tokens)
    assert list(trimmed.messages) == system + rest[fitting[0] :]
    assert list(trimmed.dropped) == rest[: fitting[0]]


def test_counts_few_times() -> None:
    chat: list[Message] = [{"role": "user", "content": "word"}] * 1_000
    calls = 0

    def counting(messages: Sequence[Message]) -> int:
        nonlocal calls
        calls += 1
        return tokens(messages)

    assert len(trim_history(chat, 100, counting).messages) == 16
    assert calls <= 12
    calls = 0
    assert trim_history(chat, 10_000, counting).dropped == ()
    assert calls == 1
