"""Chats with tools through `LLM`, in real models' templates: what is shown, what is forced, and what comes back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import octavo.llm
from octavo import LLM, FinishReason, InvalidParameterError, SamplingParams, UnsupportedParameterError
from octavo.types import Message

pytestmark = [pytest.mark.model, pytest.mark.reference_data]

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Berlin", "Köln"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now"}}
ASKED: Message = {"role": "user", "content": "How is the weather in Köln?"}
SHORT = SamplingParams(max_new_tokens=160, seed=1)


@pytest.fixture(
    scope="module", params=["Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B", "meta-llama-Llama-3.1-8B-Instruct"]
)
def llm(request: Any, default_model_path: Path, llama_cpp_models: Path) -> Iterator[LLM]:
    """The default model, told to speak in another's template."""
    template = (llama_cpp_models / "templates" / f"{request.param}.jinja").read_text()
    plan_model = octavo.llm.plan_model

    def planned(*arguments: Any, **more: Any) -> Any:
        model = plan_model(*arguments, **more)
        return dataclasses.replace(model, source=dataclasses.replace(model.source, chat_template=template))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("octavo.llm.plan_model", planned)
        llm = LLM(default_model_path, device="cpu", context=2048, threads=1)
    with llm:
        yield llm


@pytest.fixture(scope="module")
def plain(default_model_path: Path) -> Iterator[LLM]:
    with LLM(default_model_path, device="cpu", context=512, threads=1) as llm:
        yield llm


def test_forced_calls_follow_their_schemas(llm: LLM) -> None:
    done = llm.chat([ASKED], SHORT, tools=[WEATHER, NOW], tool_choice="required")
    assert done.tool_calls
    assert len({call["id"] for call in done.tool_calls}) == len(done.tool_calls)
    ended = done.finish_reason is FinishReason.STOP
    for call in done.tool_calls if ended else done.tool_calls[:-1]:
        schema = SCHEMA if call["function"]["name"] == "weather" else {"maxProperties": 0}
        jsonschema.validate(json.loads(call["function"]["arguments"]), schema)


def test_a_named_tool_and_several_choices(llm: LLM) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    params = dataclasses.replace(SHORT, n=2)
    done = llm.chat([ASKED], params, tools=[WEATHER, NOW], tool_choice=choice)
    assert [[call["function"]["name"] for call in each.tool_calls] for each in done.choices] == [
        ["weather"]
    ] * 2


def test_a_call_and_its_answer_go_back_into_the_chat(llm: LLM) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    done = llm.chat([ASKED], SHORT, tools=[WEATHER], tool_choice=choice)
    call = done.tool_calls[0]
    chat: list[Message] = [
        ASKED,
        {"role": "assistant", "content": done.text, "tool_calls": done.tool_calls[:1]},
        {"role": "tool", "tool_call_id": call["id"], "name": "weather", "content": "Sunny, 21 degrees."},
    ]
    again = llm.chat(chat, dataclasses.replace(SHORT, max_new_tokens=4), tools=[WEATHER])
    assert again.usage.prompt_tokens > done.usage.prompt_tokens
    assert "Sunny, 21 degrees." in llm.detokenize(again.prompt_token_ids)
    city = json.loads(call["function"]["arguments"])["city"]
    assert f'"{city}"' in llm.detokenize(again.prompt_token_ids).rpartition("How is the weather")[2]


def test_the_model_is_shown_the_tools_unless_there_is_no_choice(llm: LLM) -> None:
    few = SamplingParams(max_new_tokens=2)
    shown, hidden = (
        llm.detokenize(llm.chat([ASKED], few, tools=[WEATHER], tool_choice=choice).prompt_token_ids)
        for choice in ("auto", "none")
    )
    assert "weather" in shown.replace("How is the weather", "")
    assert "weather" not in hidden.replace("How is the weather", "")


def test_what_is_no_call_stays_text(llm: LLM) -> None:
    done = llm.chat([ASKED], dataclasses.replace(SHORT, max_new_tokens=8, ignore_eos=True), tools=[WEATHER])
    assert done.finish_reason is FinishReason.LENGTH
    assert done.tool_calls == ()
    assert done.text + done.reasoning


def test_a_model_without_tools_refuses_them_by_name(plain: LLM) -> None:
    with pytest.raises(UnsupportedParameterError) as caught:
        plain.chat([ASKED], SHORT, tools=[WEATHER])
    assert caught.value.parameter == "tools"
    assert plain.chat([ASKED], SamplingParams(max_new_tokens=1), tools=[WEATHER], tool_choice="none").text


@pytest.mark.parametrize(
    ("tools", "choice", "parameter"),
    [
        (None, "required", "tool_choice"),
        ([WEATHER], "sometimes", "tool_choice"),
        ([WEATHER], {"type": "function", "function": {"name": "other"}}, "tool_choice"),
        ([WEATHER], {"type": "function", "function": {"name": "weather", "x": 1}}, "tool_choice"),
        ([WEATHER, WEATHER], "auto", "tools"),
        ("weather", "auto", "tools"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(plain: LLM, tools: Any, choice: Any, parameter: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        plain.chat([ASKED], SHORT, tools=tools, tool_choice=choice)
    assert caught.value.parameter == parameter
