"""Reasoning, content and tool calls of an answer: the same however the text is cut, and nothing is lost."""

from __future__ import annotations

import itertools
import json
import time
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.text.answer import AnswerParser
from octavo.text.tool_syntax import HERMES, LLAMA3, MISTRAL, ToolSyntax, tool_syntax_of

TOOLS = ("get_weather", "add")


def read(text, cuts=(), **options):
    """(reasoning, content, [(name, arguments)]) of a text pushed in pieces."""
    parser = AnswerParser(**options)
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    deltas = []
    for start, end in itertools.pairwise(places):
        deltas += parser.push(text[start:end])
    deltas += parser.finish()
    names, arguments = {}, defaultdict(str)
    for delta in deltas:
        if delta.tool_call is not None:
            call = delta.tool_call
            assert (call.name is not None) == (call.index not in names), "the name comes first, and once"
            names.setdefault(call.index, call.name)
            arguments[call.index] += call.arguments
    assert list(names) == list(range(len(names)))
    assert parser.called == bool(names)
    calls = [(name, arguments[index]) for index, name in names.items()]
    return "".join(d.reasoning for d in deltas), "".join(d.content for d in deltas), calls


WEATHER = '{"city": "Köln, \\"Deutz\\" }{", "days": [1, 2]}'
MARKS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
CASES = {
    "plain": (None, {}, "  two {words} <tool_call> ", ("", "  two {words} <tool_call> ", [])),
    "hermes": (
        HERMES,
        {},
        'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": ' + WEATHER + "}\n</tool_call>",
        ("", "Let me see.", [("get_weather", WEATHER)]),
    ),
    "hermes, two calls and an answer": (
        HERMES,
        {},
        '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>\n<tool_call>\n{"arguments": {"a": 2}, '
        '"name": "add", "id": "x"}\n</tool_call>\nDone.',
        ("", "Done.", [("add", '{"a": 1}'), ("add", '{"a": 2}')]),
    ),
    "hermes, more keys behind the arguments": (
        HERMES,
        {},
        '<tool_call>{"name": "add", "arguments": {}, "id": {"x": "}"}}</tool_call>',
        ("", "", [("add", "{}")]),
    ),
    "hermes, a tool that was not offered": (
        HERMES,
        {},
        'a <tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        ("", 'a <tool_call>{"name": "rm", "arguments": {}}</tool_call>', []),
    ),
    "hermes, no JSON": (HERMES, {}, "<tool_call>none</tool_call>", ("", "<tool_call>none</tool_call>", [])),
    "hermes, cut in the arguments": (
        HERMES,
        {},
        '<tool_call>{"name": "add", "arguments": {"a": 1',
        ("", "", [("add", '{"a": 1')]),
    ),
    "hermes, cut in the name": (
        HERMES,
        {},
        'x<tool_call>{"name": "ad',
        ("", 'x<tool_call>{"name": "ad', []),
    ),
    "llama3": (LLAMA3, {}, '{"name": "add", "parameters": {"a": 1}}', ("", "", [("add", '{"a": 1}')])),
    "llama3, marked, two": (
        LLAMA3,
        {},
        '<|python_tag|>{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {}}',
        ("", "", [("add", '{"a": 1}'), ("add", "{}")]),
    ),
    "llama3, JSON that is the answer": (LLAMA3, {}, '{"a": {"b": 1}} ok', ("", '{"a": {"b": 1}} ok', [])),
    "llama3, JSON later": (
        LLAMA3,
        {},
        'So: {"name": "add", "parameters": {}}',
        ("", 'So: {"name": "add", "parameters": {}}', []),
    ),
    "mistral": (
        MISTRAL,
        {},
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": [2]}}]',
        ("", "", [("add", '{"a": 1}'), ("add", '{"a": [2]}')]),
    ),
    "mistral v11": (
        MISTRAL,
        {},
        'Sure.[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]get_weather[CALL_ID]abc123xyz[ARGS]{}',
        ("", "Sure.", [("add", '{"a": 1}'), ("get_weather", "{}")]),
    ),
    "thinking": (
        HERMES,
        {"thinks": True, "thinking": True},
        "\nWhy? <tool_call> no\n</think>\n\nBecause.",
        ("Why? <tool_call> no", "Because.", []),
    ),
    "thinks": (
        None,
        {"thinks": True},
        "\n<think>\nWhy?\n</think>\n\nBecause. <think>",
        ("Why?", "Because. <think>", []),
    ),
    "control tokens that mark nothing": (
        HERMES,
        {"hidden": MARKS, "thinks": True},
        '</think><think>x</think>a </tool_call> <think><tool_call>{"name": "add", "arguments": {}}</tool_call>'
        "b</think>",
        ("x", "ab", [("add", "{}")]),
    ),
    "a control token that opens no call": (
        HERMES,
        {"hidden": MARKS},
        "a <tool_call>none</tool_call>.",
        ("", "a none.", []),
    ),
    "one call and no more": (
        HERMES,
        {"single_call": True},
        'a <tool_call>{"name": "add", "arguments": {}}</tool_call><tool_call>{"name": "add", "arguments": '
        '{"a": 2}}</tool_call>b',
        ("", "a", [("add", "{}")]),
    ),
    "thinks, but does not": (None, {"thinks": True}, " <thin air", ("", " <thin air", [])),
    "thinks to the end": (None, {"thinks": True}, "<think>a </thi", ("a </thi", "", [])),
    "thinks, then calls": (
        HERMES,
        {"thinks": True},
        '<think>x</think>\n<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>',
        ("x", "", [("add", "{}")]),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_parts(case):
    syntax, options, text, expected = CASES[case]
    assert read(text, syntax=syntax, tools=TOOLS if syntax else (), **options) == expected


@pytest.mark.parametrize("case", CASES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_parts_do_not_depend_on_the_cuts(case, data):
    syntax, options, text, expected = CASES[case]
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=len(text)))
    assert read(text, cuts, syntax=syntax, tools=TOOLS if syntax else (), **options) == expected


PIECES = st.lists(
    st.sampled_from(
        [
            "<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "<|python_tag|>", "[ARGS]", "add",
            '{"name": "add", ', '"arguments": ', '"parameters": ', "{", "}", '"', "\\", "[", "]", ",", ";", " ", "\n",
            "x", "<", "<to", "</", "[TOOL",
        ]
    ),
    max_size=14,
)  # fmt: skip


@pytest.mark.parametrize("syntax", [None, HERMES, LLAMA3, MISTRAL])
@given(pieces=PIECES, thinks=st.booleans(), thinking=st.booleans(), hides=st.booleans(), data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_text_is_read_alike_whole_and_in_pieces(syntax, pieces, thinks, thinking, hides, data):
    text = "".join(pieces)
    hidden = (*MARKS, "[TOOL_CALLS]", "<|python_tag|>", "[ARGS]") if hides else ()
    options = {
        "syntax": syntax,
        "tools": TOOLS,
        "thinks": thinks,
        "thinking": thinking,
        "hidden": hidden,
        "single_call": hides and thinks,
    }
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=len(text)))
    assert read(text, cuts, **options) == read(text, **options) == read(text, range(len(text)), **options)


def test_arguments_stream():
    parser = AnswerParser(syntax=HERMES, tools=TOOLS)
    parser.push('<tool_call>{"name": "add", "arguments": ')
    assert [d.tool_call.arguments for d in parser.push('{"a": ')] == ["", '{"a": ']
    assert [d.tool_call.arguments for d in parser.push("12")] == ["12"]


def test_twice_the_text_takes_about_twice_the_time():
    """A call that never ends, a name that never comes: no squared time (figure A12)."""

    def seconds(head, count):
        parser = AnswerParser(syntax=HERMES, tools=TOOLS)
        parser.push(head)
        start = time.process_time()
        for _ in range(count):
            parser.push('{"x":1,')
        return time.process_time() - start

    for head in ('<tool_call>{"x": ', '<tool_call>{"name": "add", "arguments": {"x": [', "<tool_call>{"):
        times = [min(seconds(head, count) for _ in range(3)) for count in (4000, 16000)]
        assert times[1] < 12 * times[0], times


@pytest.mark.parametrize(
    ("template", "syntax"),
    [
        ("{% if tools %}<tool_call>\n", HERMES),
        ("{% if tools %}<tool_call><function=", None),
        ("{% if tools %}[TOOL_CALLS]", MISTRAL),
        ("<|start_header_id|>{{ tools }}{\"name\": , \"parameters\": }", LLAMA3),
        ("<|im_start|>", None),
    ],
)  # fmt: skip
def test_the_template_shows_the_syntax(template: str, syntax: ToolSyntax | None):
    assert tool_syntax_of(template) is syntax


def test_arguments_are_the_models_own_text():
    _, _, calls = read(CASES["hermes"][2], syntax=HERMES, tools=TOOLS)
    assert json.loads(calls[0][1])["city"] == 'Köln, "Deutz" }{'
