"""Forced calls and grammars behind reasoning, with a real model that would do neither by itself."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import openai
import pytest

pytestmark = pytest.mark.model

TOOL_WORKER = (str(Path(__file__).with_name("tool_worker.py")),)
CITY = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Berlin", "Köln"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {
        "type": "function",
        "function": {
            "name": "now",
            "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
        },
    },
]


@pytest.fixture(scope="module")
def server(serving, served, default_model_path):
    model = served("smollm2", str(default_model_path), context=1024, threads=1)
    with serving(model, command=TOOL_WORKER) as harness:
        harness.wait_ready(120)
        yield harness


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", timeout=60) as client:
        yield client


def ask(client, **more):
    return client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "How is the weather in Köln?"}],
        max_tokens=200,
        **more,
    )


@pytest.mark.parametrize("seed", range(3))
def test_required_and_named(client, seed):
    choice = ask(
        client, tools=TOOLS, tool_choice="required", seed=seed, temperature=2, parallel_tool_calls=False
    ).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])
    named = {"type": "function", "function": {"name": "weather"}}
    with ask(client, tools=TOOLS, tool_choice=named, seed=seed, temperature=2, stream=True) as stream:
        deltas = [chunk.choices[0].delta for chunk in stream]
    pieces = [piece for delta in deltas for piece in delta.tool_calls or []]
    assert pieces[0].function.name == "weather"
    jsonschema.validate(json.loads("".join(piece.function.arguments for piece in pieces)), CITY)


def test_a_strict_tool_needs_markers_that_are_tokens(client):
    strict = {"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, tools=[strict])
    assert caught.value.param == "tools"


def test_a_schema_that_cannot_be_kept_is_refused_by_name(client):
    bad = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, tools=[bad], tool_choice="required")
    assert (caught.value.param, caught.value.code) == ("tools", "invalid_grammar")


def test_a_response_format_and_tools_are_one_too_many(client):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, tools=TOOLS, response_format={"type": "json_object"})
    assert caught.value.param == "response_format"


@pytest.mark.parametrize("opened", [False, True])
def test_a_response_format_is_for_the_content(client, opened):
    """Where the prompt has opened the thoughts, the model may only stop in them by closing them."""
    choice = ask(
        client,
        response_format={"type": "regex", "regex": "(sun|rain)!"},
        extra_body={"chat_template_kwargs": {"enable_thinking": opened}},
        logit_bias={},
        temperature=0,
    ).choices[0]
    if opened:  # this model never closes them
        assert choice.finish_reason == "length"
        assert choice.message.content == ""
        assert choice.message.reasoning_content
    else:
        assert choice.message.content in ("sun!", "rain!")


def test_no_lark_of_a_caller_names_a_control_token(server):
    for lark in ('start: <[1]> "a"', "start: <|im_start|>", "start: /a\n/ <[1]> /b/"):
        response = server.chat("x", response_format={"type": "grammar", "grammar": lark})
        assert response.status_code == 400
        assert "special token" in response.json()["error"]["message"]


THINKING = {"chat_template_kwargs": {"enable_thinking": True}}


@pytest.mark.parametrize("budget", [0, 7])
@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_ends_at_its_budget(server, budget, stream):
    """The prompt has opened the block, and this model would never close it by itself."""
    asked = {"temperature": 1, "seed": 4, "max_tokens": 60, "ignore_eos": True, **THINKING}
    free = server.chat("Why is the sky blue?", **asked).json()
    assert free["choices"][0]["message"]["content"] == ""
    assert free["usage"]["completion_tokens_details"]["reasoning_tokens"] == 60

    response = server.chat("Why is the sky blue?", **asked, reasoning_budget=budget, stream=stream)
    assert response.status_code == 200, response.text
    if stream:
        deltas = [
            json.loads(line[6:])["choices"][0]["delta"]
            for line in response.text.split("\n\n")
            if line.startswith("data: {")
        ]
        thought = "".join(delta.get("reasoning_content", "") for delta in deltas)
        content = "".join(delta.get("content", "") for delta in deltas)
    else:
        answer = response.json()
        message = answer["choices"][0]["message"]
        thought, content = message.get("reasoning_content", ""), message["content"]
        marker = 8  # "\n</think>\n\n" in this vocabulary, at most
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] <= budget + 3 + marker
    assert len(thought.split()) <= budget
    assert bool(thought) == (budget > 0)
    assert free["choices"][0]["message"]["reasoning_content"].startswith(thought)
    assert content
    assert "think>" not in thought + content


def test_a_budget_and_a_schema_hold_together(server):
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    answer = server.chat(
        "Weather?", response_format=schema, reasoning_budget=9, max_tokens=200, temperature=1, **THINKING
    ).json()
    jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), CITY)


def test_a_budget_in_responses(client):
    """Without thoughts a budget has nothing to do; where a template knows none it is refused."""
    answer = client.responses.create(
        model="smollm2", input="Hi.", max_output_tokens=5, extra_body={"reasoning": {"max_tokens": 5}}
    )
    assert answer.usage.output_tokens_details.reasoning_tokens == 0


def test_a_budget_is_refused_where_nothing_thinks(default_server):
    response = default_server.chat("x", reasoning_budget=5)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "reasoning_budget")


def test_calls_that_cannot_be_held_are_free_and_it_is_said(server):
    """Of these markers the model's text cannot be told: not strict, so the tools are shown all the same."""
    answer = server.chat("x", tools=TOOLS, max_tokens=3).json()
    assert "may miss their schemas" in " ".join(answer["notices"])
