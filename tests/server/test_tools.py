"""Tools and reasoning over HTTP, with OpenAI's own client: what is shown to the model, and what comes back."""

from __future__ import annotations

import json
import re
from urllib.parse import quote

import openai
import pytest

HEAD = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Call with <tool_call>.<|im_end|>\n{% endif %}"
)
TURNS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "{% if message.role == 'tool' %}({{ message.name }}){% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINK = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
MARKERS = "<tool_call>,</tool_call>,<think>,</think>"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
SEE = "Let me see (!stop)."
TWO = f"{SEE}{CALL}\n{CALL}"


@pytest.fixture(scope="module", params=["", MARKERS], ids=["markers as text", "control tokens"])
def server(request, serving, served):
    template = quote(HEAD + TURNS + THINK)
    with serving(served(model=f"fake?template={template}&markers={request.param}", context=2048)) as harness:
        harness.wait_ready()
        yield harness


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


def ask(client, text, **more):
    return client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": text}], **{"tools": [WEATHER], **more}
    )


def test_calls_of_a_whole_answer(client):
    choice = ask(client, TWO).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == SEE
    assert [call.type for call in choice.message.tool_calls] == ["function"] * 2
    assert [call.function.name for call in choice.message.tool_calls] == ["weather"] * 2
    assert [call.function.arguments for call in choice.message.tool_calls] == ['{"city": "Köln"}'] * 2
    ids = [call.id for call in choice.message.tool_calls]
    assert len(set(ids)) == 2
    assert all(re.fullmatch("call_[0-9a-f]{24}", each) for each in ids)


def test_an_answer_of_calls_alone_has_no_content(client):
    assert ask(client, f"{CALL}!stop", stop=["!stop"]).choices[0].message.content is None


def test_streamed_calls_are_pieces_that_join(server, client):
    with ask(client, f"!slow:3 {TWO}", stream=True) as stream:
        chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == f"!slow:3 {SEE}"
    calls: dict[int, list] = {}
    for chunk in chunks:
        for piece in chunk.delta.tool_calls or []:
            calls.setdefault(piece.index, []).append(piece)
    assert list(calls) == [0, 1]
    for pieces in calls.values():
        first, *rest = pieces
        assert (first.type, first.function.name) == ("function", "weather")
        assert first.id.startswith("call_")
        assert all(piece.id is None and piece.function.name is None for piece in rest)
        assert len(rest) > 3
        assert json.loads("".join(piece.function.arguments for piece in pieces)) == {"city": "Köln"}
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]


def test_the_clients_stream_helper_reads_them(client):
    with client.chat.completions.stream(
        model="fake", messages=[{"role": "user", "content": TWO}], tools=[WEATHER]
    ) as stream:
        kinds = [event.type for event in stream]
        done = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    assert done.choices[0].message.tool_calls[1].function.arguments == '{"city": "Köln"}'


@pytest.mark.parametrize("stream", [False, True])
def test_without_parallel_calls_there_is_one(server, stream):
    response = server.chat(TWO, tools=[WEATHER], parallel_tool_calls=False, max_tokens=None, stream=stream)
    assert "x-octavo-ignored" not in response.headers
    assert response.text.count('"name":"weather"') == 1
    assert '"finish_reason":"tool_calls"' in response.text


def test_the_model_is_shown_the_tools_unless_there_is_no_choice(client):
    shown = ask(client, "x!stop").usage.prompt_tokens
    hidden = ask(client, "x!stop", tool_choice="none").usage.prompt_tokens
    bare = ask(client, "x!stop", tools=openai.omit).usage.prompt_tokens
    assert shown > hidden + len(json.dumps(WEATHER)) / 2
    assert hidden == bare
    assert ask(client, f"{CALL}!stop", tool_choice="none").choices[0].message.tool_calls is None


def test_a_tool_that_was_not_offered_is_not_called(server, client):
    other = CALL.replace("weather", "delete_all")
    choice = ask(client, f"{other}!stop").choices[0]
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "stop"
    assert "delete_all" in choice.message.content


def test_a_call_that_is_cut_short_is_not_to_be_made(client):
    choice = ask(client, TWO, max_tokens=50).choices[0]
    assert choice.finish_reason == "length"


def test_a_conversation_with_calls_goes_back_in(server, client):
    said = ask(client, TWO).choices[0].message
    messages = [
        {"role": "user", "content": "How is it?"},
        said,
        *({"role": "tool", "tool_call_id": call.id, "content": "12 °C"} for call in said.tool_calls),
        {"role": "user", "content": "Thanks.!stop"},
    ]
    answer = client.chat.completions.create(model="fake", messages=messages, tools=[WEATHER])
    assert answer.choices[0].message.content == "Thanks.!stop"
    dumped = [each if isinstance(each, dict) else each.model_dump() for each in messages]
    prompt = server.client.post("/tokenize", json={"messages": dumped}).json()["tokens"]
    text = bytes(token for token in prompt if token < 256).decode()
    assert text.count("12 °C(weather)") == 2


def test_reasoning_is_apart(client):
    text = "<think>\nHm, 3.\n</think>\n\nIt is 3.!stop"
    choice = ask(client, text, tools=openai.omit).choices[0]
    assert choice.message.content == "It is 3.!stop"
    assert choice.message.reasoning_content == "Hm, 3."
    details = ask(client, text).usage.completion_tokens_details
    assert details.reasoning_tokens in (len(".Hm, 3...") + 1, len("<think>\nHm, 3.\n</think>"))
    plain = ask(client, f"x{text}")
    assert plain.usage.completion_tokens_details.reasoning_tokens == 0
    assert not hasattr(plain.choices[0].message, "reasoning_content")
    with ask(client, text, stream=True) as stream:
        deltas = [chunk.choices[0].delta for chunk in stream]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Hm, 3."
    assert "".join(delta.content or "" for delta in deltas) == "It is 3.!stop"


def test_reasoning_can_be_switched_off(client):
    on = ask(client, "x!stop").usage.prompt_tokens
    off = ask(client, "x!stop", reasoning_effort="none").usage.prompt_tokens
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
    assert off > on
    assert ask(client, "x!stop", extra_body=kwargs).usage.prompt_tokens == off


def flat(tool, **more):
    return {"type": "function", **tool["function"], "strict": False, **more}


def test_responses_are_items(client):
    text = f"<think>Hm.</think>!stop See. {CALL}\n{CALL}"
    answer = client.responses.create(model="fake", input=text, tools=[flat(WEATHER)])
    assert answer.status == "completed"
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call", "function_call"]
    thoughts, said, call, other = answer.output
    assert thoughts.content[0].text == "Hm."
    assert answer.usage.output_tokens_details.reasoning_tokens in (5, len("<think>Hm.</think>"))
    assert said.content[0].text == answer.output_text == "!stop See."
    assert (call.name, call.arguments, call.status) == ("weather", '{"city": "Köln"}', "completed")
    assert call.call_id != other.call_id

    back = [
        {"role": "user", "content": "How is it?"},
        *(item.model_dump(exclude_none=True) for item in answer.output),
        *(
            {"type": "function_call_output", "call_id": each.call_id, "output": "12 °C"}
            for each in (call, other)
        ),
        {"role": "user", "content": "Thanks.!stop"},
    ]
    again = client.responses.with_raw_response.create(model="fake", input=back, tools=[flat(WEATHER)])
    assert again.headers["x-octavo-ignored"] == "input.id, input.status, input.reasoning"
    assert again.parse().output_text == "Thanks.!stop"
    alone = client.responses.create(model="fake", input=back[-1:], tools=[flat(WEATHER)])
    assert again.parse().usage.input_tokens > alone.usage.input_tokens + 2 * len("12 °C(weather)")


def test_events_of_responses_tell_the_same(client):
    text = f"<think>Hm.</think>!slow:2 !stop See. {CALL}"
    with client.responses.create(model="fake", input=text, tools=[flat(WEATHER)], stream=True) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events if not event.type.endswith(".delta")]
    assert kinds == [
        f"response.{kind}"
        for kind in (
            "created in_progress "
            "output_item.added content_part.added reasoning_text.done content_part.done output_item.done "
            "output_item.added content_part.added output_text.done content_part.done output_item.done "
            "output_item.added function_call_arguments.done output_item.done completed"
        ).split()
    ]
    pieces = [event for event in events if event.type == "response.function_call_arguments.delta"]
    assert len(pieces) > 3
    assert "".join(event.delta for event in pieces) == '{"city": "Köln"}'
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.to_dict() for item in done] == [item.to_dict() for item in events[-1].response.output]
    with client.responses.stream(model="fake", input=text, tools=[flat(WEATHER)]) as helper:
        final = helper.get_final_response()
    assert final.output[-1].arguments == '{"city": "Köln"}'


def test_a_response_that_is_cut_says_so(client):
    answer = client.responses.create(model="fake", input=CALL, tools=[flat(WEATHER)], max_output_tokens=60)
    assert (answer.status, answer.output[-1].status) == ("incomplete", "incomplete")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [flat(WEATHER, strict=True)]}, "tools"),
        ({"tools": [flat(WEATHER)], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [flat(WEATHER)], "tool_choice": {"type": "mcp"}}, "tool_choice"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0]"),
        ({"input": [{"type": "function_call_output", "output": "f"}]}, "input[0]"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_responses_cannot_do_is_refused_by_name(client, more, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"model": "fake", "input": "x", **more})
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"preserve_thinking": True}}, "chat_template_kwargs.preserve_thinking"),
        (
            {"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "none"},
            "reasoning_effort",
        ),
        ({"reasoning_budget": -1}, "reasoning_budget"),
        ({"reasoning_budget": 5, "reasoning": {"max_tokens": 6}}, "reasoning_budget"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"reasoning": {"depth": 5}}, "reasoning.depth"),
        ({"tools": [WEATHER], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice",
        ),
        ({"tools": [{**WEATHER, "function": {**WEATHER["function"], "strict": True}}]}, "tools"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_is_refused_by_name(server, more, param):
    response = server.chat("x", **more)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_a_template_without_tools_refuses_them(fake):
    response = fake.chat("x", tools=[WEATHER])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools"
    assert "template" in response.json()["error"]["message"]
    assert fake.chat("x!stop", tools=[WEATHER], tool_choice="none").status_code == 200
    assert fake.chat("x", reasoning_effort="low").json()["error"]["param"] == "reasoning_effort"


def test_an_unknown_syntax_refuses_them(serving, served):
    template = quote((HEAD + TURNS).replace("<tool_call>", "<call>").replace("</tool_call>", "</call>"))
    with serving(served(model=f"fake?template={template}")) as harness:
        harness.wait_ready()
        error = harness.chat("x", tools=[WEATHER]).json()["error"]
        assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")


def test_control_tokens_that_mark_nothing_are_not_content(serving, served):
    template = quote(HEAD + TURNS + THINK)
    with serving(served(model=f"fake?template={template}&markers={MARKERS}")) as harness:
        harness.wait_ready()
        text = "a </think> b <tool_call>no call</tool_call> c!stop"
        message = harness.chat(text, tools=[WEATHER], max_tokens=None).json()["choices"][0]["message"]
        assert message["content"] == "a  b no call c!stop"
        assert "tool_calls" not in message
        response = harness.chat(text, tools=[WEATHER], max_tokens=None, stream=True)
        assert "think" not in response.text
        assert "tool_call" not in response.text
