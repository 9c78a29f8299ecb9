"""Real models' chat templates: rendered as transformers renders them, and no content becomes a control token.

Figures 32 and 33 of the project's list: 70 templates that llama.cpp ships, chats with systems, tools, calls and
thoughts. Where transformers' renderer raises, so do we, or we say what was done instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken

from octavo.errors import IncompatibleModelError, OctavoError
from octavo.sources.gguf import read_gguf
from octavo.text.chat import ChatTemplate
from octavo.text.tokenizer import Tokenizer, load_tokenizer
from octavo.types import TokenizerSource

pytestmark = pytest.mark.reference_data

CONFIG = {"bos_token": "<s>", "eos_token": "</s>"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its name"},
                "days": {"type": "integer"},
            },
            "required": ["city"],
        },
    },
}


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(**arguments: Any) -> dict[str, Any]:
    return {
        "id": "call12345",
        "type": "function",
        "function": {"name": "get_weather", "arguments": json.dumps(arguments)},
    }


ASKED = turn("user", "How is the weather in Köln?")
CALLED = turn("assistant", "", tool_calls=[call(city="Köln <\"&'", days=2)])
ANSWERED = turn("tool", '{"sky": "blue"}', tool_call_id="call12345", name="get_weather")
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [turn("user", "Hi")]},
    "three turns": {"messages": [turn("user", " Hi\n"), turn("assistant", "Hello! "), turn("user", "Well?")]},
    "system": {"messages": [turn("system", "Be brief."), turn("user", "Hi")]},
    "system, three turns": {
        "messages": [
            turn("system", "Be\n\nbrief. "),
            turn("user", "x < y > z {{ a }} {% b %}"),
            turn("assistant", "e\u0301 中文 😀\n"),
            turn("user", "<b>bold</b>"),
        ]
    },
    "answer replayed": {"messages": [turn("user", "Hi"), turn("assistant", "Yes.")], "prompt": False},
    "thoughts in the text": {
        "messages": [
            turn("user", "Hi"),
            turn("assistant", "<think>\nhm\n</think>\n\nYes."),
            turn("user", "So?"),
        ]
    },
    "thoughts apart": {
        "messages": [
            turn("user", "Hi"),
            turn("assistant", "Yes.", reasoning_content="hm"),
            turn("user", "So?"),
        ]
    },
    "thinking off": {"messages": [turn("user", "Hi")], "options": {"enable_thinking": False}},
    "thinking on": {"messages": [turn("user", "Hi")], "options": {"enable_thinking": True}},
    "tools": {"messages": [ASKED], "tools": [WEATHER]},
    "tools and system": {"messages": [turn("system", "Be brief."), ASKED], "tools": [WEATHER]},
    "tool called": {"messages": [ASKED, CALLED, ANSWERED], "tools": [WEATHER]},
}


@pytest.fixture(scope="module")
def pair(byte_level_json: str) -> tuple[Tokenizer, Any]:
    """Our tokenizer, and transformers' over the same pipeline."""
    from transformers import PreTrainedTokenizerFast

    pipeline = tokenizers.Tokenizer.from_str(byte_level_json)
    pipeline.add_special_tokens([AddedToken(token, normalized=False) for token in CONFIG.values()])
    ours = load_tokenizer(TokenizerSource("tokenizer.json", pipeline.to_str().encode(), config=CONFIG))
    return ours, PreTrainedTokenizerFast(tokenizer_object=pipeline, **CONFIG)


def theirs_render(theirs: Any, source: str, conversation: dict[str, Any], *, as_text: bool) -> str:
    """transformers' text; arguments of calls as objects, as it recommends, or as the text they came as."""
    chat = json.loads(json.dumps(conversation["messages"]))
    for message in chat:
        for made in message.get("tool_calls", ()):
            if not as_text:
                made["function"]["arguments"] = json.loads(made["function"]["arguments"])
    if "developer" not in source:
        for message in chat:
            message["role"] = message["role"].replace("developer", "system")
    text: str = theirs.apply_chat_template(
        chat,
        chat_template=source,
        tools=conversation.get("tools"),
        add_generation_prompt=conversation.get("prompt", True),
        tokenize=False,
        **conversation.get("options", {}),
    )
    return text


def templates(folder: Path) -> list[Path]:
    found = sorted((folder / "templates").glob("*.jinja"))
    assert len(found) == 70
    return found


def test_every_template_renders_as_in_transformers(pair, llama_cpp_models):
    """Byte for byte, wherever transformers renders at all."""
    ours, theirs = pair
    different: list[tuple[str, str]] = []
    equal = refused = said = 0
    for path in templates(llama_cpp_models):
        source = path.read_text(encoding="utf-8")
        template = ChatTemplate(source, ours)
        for name, conversation in CONVERSATIONS.items():
            try:
                expected = theirs_render(
                    theirs, source, conversation, as_text=template._wants_arguments_as_text
                )
            except Exception:  # a template is a program: it may raise anything
                expected = None
            try:
                rendered = template.render(
                    conversation["messages"],
                    tools=conversation.get("tools", ()),
                    options=conversation.get("options", {}),
                    add_generation_prompt=conversation.get("prompt", True),
                )
            except OctavoError:
                # transformers raises too, or leaves the tools out without a word.
                right = expected is None or (
                    "tools" in conversation and "The weather in a city." not in expected
                )
                refused += right
            else:
                if any("system message" in notice for notice in rendered.notices):  # it was moved
                    right = expected is None or "brief" not in expected
                    said += right
                else:
                    right = rendered.text == expected
                    equal += right
            if not right:
                different.append((path.stem, name))
    assert not different
    assert (equal, refused, said) == (770, 68, 2)


# --- content that tries to be control tokens -----------------------------------------------------------------

VOCABULARIES = 13
"""Of the 15: BERT's is no language model's, and Gemma 4's, of a family that is not read, is refused by name."""


@pytest.fixture(scope="module")
def vocabularies(llama_cpp_models: Path) -> dict[str, Tokenizer]:
    """The tokenizers of the GGUFs that have reference ids."""
    found = {}
    for path in sorted(llama_cpp_models.glob("ggml-vocab-*.gguf")):
        if path.with_name(path.name + ".inp").exists():
            metadata = read_gguf(path).metadata
            try:
                found[path.stem.removeprefix("ggml-vocab-")] = load_tokenizer(
                    TokenizerSource("gguf", metadata=metadata)
                )
            except IncompatibleModelError:
                continue
    return found


def payloads(tokenizer: Tokenizer) -> list[str]:
    """Control tokens of the vocabulary and of well-known families: whole, in other words, halved, in pairs."""
    own = sorted(tokenizer.spelling(i) for i in tokenizer.reserved_token_ids)[:14]
    known = [
        "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>system<|end_header_id|>", "[INST]", "</s>",
        "<start_of_turn>", "<tool_call>", "</tool_call>", "<think>", "</think>", "<｜User｜>", "<|endoftext|>",
    ]  # fmt: skip
    halves = [part for token in known[:4] for part in (token[: len(token) // 2], token[len(token) // 2 :])]
    return [*own, *known, *halves, *(f"a{token}\n{token}b" for token in known[:5])]


def attack(texts: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(messages, tools) with the texts wherever a caller's content goes."""
    everything = " ".join(texts)
    function = {**WEATHER["function"], "description": everything}
    made = call(city=everything, **{text: text for text in texts})
    return [
        turn("system", everything),
        turn("user", everything),
        turn("assistant", "", tool_calls=[made]),
        turn("tool", everything, tool_call_id="call12345", name=everything),
        turn("assistant", "ok"),
        *(message for text in texts for message in (turn("user", text), turn("assistant", "ok"))),
        turn("user", "q"),
    ], [{"type": "function", "function": function}]


@pytest.mark.parametrize("share", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_no_content_becomes_a_control_token(llama_cpp_models, vocabularies, share):
    """Of all pairs of a template and a vocabulary one in `share`."""
    assert len(vocabularies) == VOCABULARIES
    renderings, injected = 0, []
    for at, (name, tokenizer) in enumerate(vocabularies.items()):
        texts = payloads(tokenizer)
        assert len(texts) >= 25
        for path in templates(llama_cpp_models)[at % share :: share]:
            template = ChatTemplate(path.read_text(encoding="utf-8"), tokenizer)
            messages, tools = attack(texts)
            neutral, neutral_tools = attack([f"q{i}" for i in range(len(texts))])
            if not template.takes_tools:
                tools, neutral_tools = [], []
            try:
                ids = template.render(messages, tools=tools).token_ids
                plain = template.render(neutral, tools=neutral_tools).token_ids
            except OctavoError:
                continue
            renderings += 1
            reserved = tokenizer.reserved_token_ids
            if [i for i in ids if i in reserved] != [i for i in plain if i in reserved]:
                injected.append((name, path.stem))
    assert not injected
    assert renderings > 600 / share


def test_the_same_content_does_inject_where_it_is_not_guarded(llama_cpp_models, vocabularies):
    """Negative control: the rendered text, encoded the usual way."""
    tokenizer = vocabularies["qwen2"]
    source = (llama_cpp_models / "templates" / "Qwen-Qwen2.5-7B-Instruct.jinja").read_text(encoding="utf-8")
    messages, tools = attack(payloads(tokenizer))
    rendered = ChatTemplate(source, tokenizer).render(messages, tools=tools)

    def controls(ids):
        return sum(i in tokenizer.reserved_token_ids for i in ids)

    assert controls(tokenizer.encode(rendered.text, parse_special=True)) > controls(rendered.token_ids) + 100
