"""Prompts: text, ids and messages of any type are taken whole or refused by name; lengths to the token."""

from __future__ import annotations

import array
from collections import UserList
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo.errors import (
    ContextLengthError,
    EmptyPromptError,
    InvalidInputError,
    NotTextError,
    OctavoError,
)
from octavo.validate import (
    Limits,
    resolve_max_new_tokens,
    split_prompts,
    validate_messages,
    validate_prompt_ids,
    validate_text,
)

V, CONTEXT = 1000, 64

# --- text ------------------------------------------------------------------------------------------


@hypothesis.settings(deadline=None)
@given(st.text(min_size=1))
def test_text_is_unchanged_and_bytes_mean_the_same(text: str) -> None:
    assert validate_text(text) == text
    assert validate_text(text.encode()) == text.removeprefix("\ufeff") or text == "\ufeff"


def test_blank_and_nul_are_text() -> None:
    assert validate_text(" ") == " "
    assert validate_text("a\0b") == "a\0b"


@pytest.mark.parametrize("empty", ["", b"", b"\xef\xbb\xbf"])
def test_empty_text(empty: object) -> None:
    with pytest.raises(EmptyPromptError) as caught:
        validate_text(empty)
    assert caught.value.exit_code == 7


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b"abc\xff", "0xff at offset 3"),
        (b"\xef\xbb\xbfab\x80", "0x80 at offset 5"),
        ("été".encode("latin-1"), "0xe9 at offset 0"),
        (b"ab\xe2\x82", "0xe2 at offset 2"),
        ("ab\ud800", "character 2"),
        (b"\xff\xfeh\x00", "0xff at offset 0"),
    ],
)
def test_what_is_not_text_says_where(data: object, where: str) -> None:
    with pytest.raises(NotTextError, match=where):
        validate_text(data)


def test_text_has_a_limit_in_bytes() -> None:
    limits = Limits(text_bytes=4)
    assert validate_text("éé", limits=limits) == "éé"
    for long in ("ééa", "ééa".encode()):
        with pytest.raises(InvalidInputError, match=r"5 bytes.*4"):
            validate_text(long, limits=limits)


# --- ids -------------------------------------------------------------------------------------------


def ids(values: object, max_new_tokens: int | None = None, context: int = CONTEXT) -> tuple[int, ...]:
    return validate_prompt_ids(values, vocab_size=V, context_tokens=context, max_new_tokens=max_new_tokens)


@pytest.mark.parametrize(
    "values",
    [
        [1, 2, 999],
        (1, 2, 999),
        np.array([1, 2, 999]),
        torch.tensor([1, 2, 999]),
        array.array("l", [1, 2, 999]),
        UserList([1, 2, 999]),
        [np.int64(1), np.uint8(2), 999],
    ],
)
def test_ids_in_any_sequence_become_plain(values: object) -> None:
    found = ids(values)
    assert found == (1, 2, 999)
    assert {type(i) for i in found} == {int}


@pytest.mark.parametrize(
    "bad",
    [
        -1,
        V,
        2**31,
        2**63,
        -(2**63),
        pytest.param(10**5000, id="huge"),
        True,
        1.0,
        "1",
        None,
        [1],
        float("nan"),
    ],
)
def test_a_bad_id_is_named_by_its_position(bad: object) -> None:
    with pytest.raises(InvalidInputError, match="prompt token 2 is"):
        ids([1, 2, bad, 3])


@pytest.mark.parametrize(
    "values", ["12", b"12", bytearray(b"1"), 5, None, {1, 2}, {1: 2}, np.array(3), iter([1])]
)
def test_what_is_no_list_of_ids(values: object) -> None:
    with pytest.raises(InvalidInputError, match="cannot be"):
        ids(values)


def test_no_ids() -> None:
    for empty in ([], (), np.array([], dtype=int)):
        with pytest.raises(EmptyPromptError):
            ids(empty)


@pytest.mark.parametrize(
    ("tokens", "max_new_tokens", "fits"),
    [
        (CONTEXT - 1, None, True),
        (CONTEXT, None, False),
        (CONTEXT + 1, None, False),
        (CONTEXT, 0, True),
        (CONTEXT + 1, 0, False),
        (CONTEXT - 10, 10, True),
        (CONTEXT - 10, 11, False),
        (CONTEXT - 1, 1, True),
        (CONTEXT, 1, False),
    ],
)
def test_the_context_is_kept_to_the_token(tokens: int, max_new_tokens: int | None, fits: bool) -> None:
    prompt = [1] * tokens
    if fits:
        assert len(ids(prompt, max_new_tokens)) == tokens
        return
    with pytest.raises(ContextLengthError) as caught:
        ids(prompt, max_new_tokens)
    assert (caught.value.prompt_tokens, caught.value.context_tokens) == (tokens, CONTEXT)
    assert str(tokens) in caught.value.message
    assert str(CONTEXT) in caught.value.message
    assert caught.value.exit_code == 7


@hypothesis.settings(deadline=None)
@given(st.none() | st.integers(1, 100), st.none() | st.integers(1, 100), st.integers(1, 80))
def test_new_tokens_never_pass_the_context(asked: int | None, default: int | None, prompt: int) -> None:
    try:
        found = resolve_max_new_tokens(asked, default=default, prompt_tokens=prompt, context_tokens=CONTEXT)
    except ContextLengthError:
        assert prompt + (asked or 1) > CONTEXT
        return
    assert 1 <= found <= CONTEXT - prompt
    assert found == min(asked or default or CONTEXT, CONTEXT - prompt)


def test_the_remedy_for_too_many_new_tokens_fits() -> None:
    with pytest.raises(
        ContextLengthError, match="60 tokens and max_new_tokens 5 make 65; the context is 64"
    ) as caught:
        resolve_max_new_tokens(5, default=256, prompt_tokens=60, context_tokens=64)
    assert "max_new_tokens 4 " in caught.value.remedy
    assert resolve_max_new_tokens(4, default=256, prompt_tokens=60, context_tokens=64) == 4


# --- several prompts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "found", "many"),
    [
        ("abc", ("abc",), False),
        (b"abc", (b"abc",), False),
        ([1, 2], ([1, 2],), False),
        (["a", "b"], ("a", "b"), True),
        (["a", [1, 2]], ("a", [1, 2]), True),
        ([[1, 2]], ([1, 2],), True),
        (("a",), ("a",), True),
        ([True], ([True],), False),
    ],
)
def test_one_prompt_or_several(prompts: object, found: tuple[object, ...], many: bool) -> None:
    assert split_prompts(prompts) == (found, many)


def test_prompts_have_a_limit() -> None:
    assert len(split_prompts(["a"] * 3, limits=Limits(prompts=3))[0]) == 3
    with pytest.raises(InvalidInputError, match="4 prompts"):
        split_prompts(["a"] * 4, limits=Limits(prompts=3))
    assert split_prompts([1] * 4, limits=Limits(prompts=3))[1] is False
    with pytest.raises(EmptyPromptError):
        split_prompts([])
    for bad in (None, 3, {"a"}, {"a": 1}):
        with pytest.raises(InvalidInputError):
            split_prompts(bad)


# --- messages --------------------------------------------------------------------------------------


def turn(role: Any = "user", content: Any = "Hi", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def test_messages_come_back_as_they_were() -> None:
    turns = [turn("system", ""), turn("user", "a"), turn("assistant", "b\n"), turn("user", "🙂")]
    assert list(validate_messages(turns)) == turns


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([turn(), "Hi"], "message 1 is 'Hi', not a mapping"),
        ([turn(name="Bob")], "message 0 has the key 'name'"),
        ([turn(tool_calls=[])], "tool_calls"),
        ([turn(role="User")], "message 0 has the role 'User'"),
        ([turn(role="tools")], "the role 'tools'"),
        ([turn(role="tool", tool_calls=[])], "not supported for the role tool"),
        ([turn(role="assistant", tool_calls="x")], "tool_calls are no list"),
        ([turn(role="tool", tool_call_id=3)], "tool_call_id 3, not a string"),
        ([turn(role=None)], "role None"),
        ([{"content": "a"}], "role None"),
        ([{"role": "user"}], "content None"),
        ([turn(content=[{"type": "text", "text": "a"}])], "content of type list, not a string"),
        ([turn(content=b"a")], "of type bytes"),
        ([{1: 2, "role": "user"}], "the key 1"),
        ("Hi", "messages cannot be 'Hi'"),
        ({"role": "user", "content": "a"}, "messages cannot be of type dict"),
        (None, "messages cannot be None"),
    ],
)
def test_bad_messages_are_named_by_place_and_key(messages: object, named: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        validate_messages(messages)
    assert named in caught.value.message
    assert caught.value.remedy


def test_a_misspelled_role_is_met_with_the_right_one() -> None:
    with pytest.raises(InvalidInputError) as caught:
        validate_messages([turn(role="assistent")])
    assert caught.value.remedy == "Did you mean assistant?"


def test_a_chat_needs_something_to_answer() -> None:
    for empty in ([], [turn(content="")], [turn("system", "Be kind."), turn(content="")]):
        with pytest.raises(EmptyPromptError):
            validate_messages(empty)


def test_messages_must_be_text() -> None:
    with pytest.raises(NotTextError, match=r"message 1.*character 1"):
        validate_messages([turn(), turn(content="a\udfff")])


def test_messages_have_limits() -> None:
    limits = Limits(messages=2, text_bytes=5)
    assert validate_messages([turn(content="éa"), turn(content="éa"[:1])], limits=limits)
    with pytest.raises(InvalidInputError, match="3 messages"):
        validate_messages([turn()] * 3, limits=limits)
    with pytest.raises(InvalidInputError, match="6 bytes"):
        validate_messages([turn(content="éa")] * 2, limits=limits)


def test_errors_never_show_a_whole_text() -> None:
    secret = "x" * 200 + "secret"
    for bad in (secret, [turn(role=secret)], [secret], [{secret: 1}]):
        with pytest.raises(InvalidInputError) as caught:
            validate_messages(bad)
        assert "secret" not in caught.value.message
        assert "\n" not in caught.value.message


# --- anything at all -------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(codec=None)),
    st.binary(),
    st.complex_numbers(),
    st.decimals(allow_nan=False),
)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(scalars, inner, max_size=3)
        | st.fixed_dictionaries({"role": inner, "content": inner})
        | st.tuples(inner, inner)
        | st.frozensets(scalars, max_size=3)
    ),
    max_leaves=8,
)


def prompt_ids(value: object) -> object:
    return ids(value)


@pytest.mark.parametrize("check", [validate_text, prompt_ids, validate_messages, split_prompts])
@hypothesis.settings(deadline=None)
@given(value=anything)
def test_any_value_is_taken_or_refused_with_a_typed_error(check: Any, value: object) -> None:
    try:
        check(value)
    except OctavoError as error:
        lines = (error.message, error.remedy)
        assert all(line and "\n" not in line for line in lines)
