"""POST /v1/chat/completions against a model that answers with its prompt: fields, streams, errors."""

from __future__ import annotations

import json

import pytest


def events(text: str) -> list[object]:
    found = []
    for block in text.split("\n\n"):
        if block:
            assert block.startswith("data: ")
            data = block.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
    return found


def test_a_whole_answer(fake):
    response = fake.chat("hello!stop")
    assert response.status_code == 200
    answer = response.json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "hello!stop", "refusal": None}
    assert answer["choices"][0]["finish_reason"] == "stop"
    usage = answer["usage"]
    assert usage["completion_tokens"] == len("hello!stop") + 1
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert "x-octavo-ignored" not in response.headers


def test_a_stream_is_the_whole_answer_in_pieces(fake):
    body = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 100}
    response = fake.chat("Grüße, 世界 🎉!stop", **body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last, done = events(response.text)
    assert done == "[DONE]"
    assert last["choices"] == []
    whole = fake.chat("Grüße, 世界 🎉!stop", max_tokens=100).json()
    assert last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"] == "Grüße, 世界 🎉!stop"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [
        chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"][0]["finish_reason"]
    ] == ["stop"]


def test_without_include_usage_no_chunk_has_usage(fake):
    for chunk in events(fake.chat("abc!stop", stream=True).text):
        assert chunk == "[DONE]" or "usage" not in chunk


def test_n_choices_have_one_seed(fake):
    answer = fake.chat("abc!stop", n=3, seed=7).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert {choice["seed"] for choice in answer["choices"]} == {7}
    assert answer["usage"]["completion_tokens"] == 3 * (len("abc!stop") + 1)
    chunks = events(fake.chat("abc!stop", n=3, stream=True).text)
    for index in range(3):
        mine = [c["choices"][0] for c in chunks if c != "[DONE]" and c["choices"][0]["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == "abc!stop"


def test_logprobs(fake):
    content = fake.chat("ab!stop", logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == "ab!stop"
    assert content[0] == {
        "token": "a",
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]}],
    }


def test_text_parts_and_developer_messages(fake):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two!stop"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    answer = fake.client.post("/v1/chat/completions", json={"model": "fake", "messages": messages}).json()
    assert answer["choices"][0]["message"]["content"] == "one\ntwo!stop"


def test_an_sdk_message_dumped_with_its_nulls_comes_back(fake):
    said = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "audio": None}
    messages = [{"role": "user", "content": "a"}, said, {"role": "user", "content": "b!stop"}]
    response = fake.client.post("/v1/chat/completions", json={"model": "fake", "messages": messages})
    assert response.json()["choices"][0]["message"]["content"] == "b!stop"


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"temprature": 1}, "temprature", "unsupported_parameter"),
        ({"temperature": 101}, "temperature", "invalid_value"),
        ({"temperature": "1"}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 2**31}, "n", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "invalid_value"),
        ({"logit_bias": {"259": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "invalid_value"),
        ({"stop_token_ids": [2**63]}, "stop_token_ids", "invalid_value"),
        ({"stop": [""]}, "stop", "invalid_value"),
        ({"stop": ["x"] * 17}, "stop", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs", "invalid_value"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "invalid_value"),
        ({"chat_template": "{{ x }}"}, "chat_template", "unsupported_parameter"),
        ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            "unsupported_parameter",
        ),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_field_that_cannot_be_honoured_is_named(fake, body, param, code):
    response = fake.chat("x", **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)


def test_a_field_without_effect_is_listed(fake):
    response = fake.chat("x!stop", user="me", store=False, metadata={"a": "b"}, temperature=None)
    assert response.status_code == 200
    assert response.headers["x-octavo-ignored"] == "user, metadata, store"


def test_fields_within_fields_are_listed_too(fake):
    messages = [
        {"role": "user", "name": "me", "content": "x"},
        {"role": "user", "name": "you", "content": "y!stop"},
    ]
    options = {"include_usage": True, "include_obfuscation": False}
    response = fake.chat("", messages=messages, stream=True, stream_options=options)
    assert response.headers["x-octavo-ignored"] == "stream_options.include_obfuscation, messages.name"


def test_unknown_model(fake):
    response = fake.chat("x", model="other")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_boundary_of_the_context(fake):
    """Figure 39: prompt and answer fill the context exactly, or the request is refused with both numbers."""
    empty = (
        fake.client.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]}).json()["count"]
        - 1
    )
    for prompt, most, status in (
        (511, 1, 200),
        (511, 2, 400),
        (512, 1, 400),
        (512, None, 400),
        (513, None, 400),
    ):
        body = {} if most is None else {"max_tokens": most}
        response = fake.chat("a" * (prompt - empty), **{"max_tokens": None, **body})
        assert response.status_code == status, (prompt, most, response.text)
        if status == 400:
            error = response.json()["error"]
            assert error["code"] == "context_length_exceeded"
            assert error["prompt_tokens"] == prompt
            assert error["context_tokens"] == 512
            assert error["param"] == ("messages" if prompt >= 512 else "max_tokens")
    whole = fake.chat("a" * (500 - empty), max_tokens=None).json()
    assert whole["usage"]["total_tokens"] == 512
    assert whole["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"max_completion_tokens": 600}, "max_completion_tokens"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 600}, "max_tokens"),
        ("/v1/completions", {"prompt": "a" * 600}, "prompt"),
        ("/v1/responses", {"input": "a", "max_output_tokens": 600}, "max_output_tokens"),
        ("/v1/responses", {"input": "a" * 600}, "input"),
    ],
)
def test_what_does_not_fit_is_named_as_the_route_calls_it(fake, path, body, param):
    if path == "/v1/chat/completions":
        body = {**body, "messages": [{"role": "user", "content": "x"}]}
    response = fake.client.post(path, json={"model": "fake", **body})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)


def test_stop_strings_are_not_shown(fake):
    """Figure 36, at the server: streamed or not, the text ends before the stop string."""
    for stream in (False, True):
        response = fake.chat("one two three", stop=["two", "wo t"], stream=stream)
        if stream:
            chunks = events(response.text)[:-1]
            text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
            reason = chunks[-1]["choices"][0]["finish_reason"]
        else:
            choice = response.json()["choices"][0]
            text, reason = choice["message"]["content"], choice["finish_reason"]
        assert (text, reason) == ("one ", "stop")


def test_a_model_without_template_says_what_to_do(serving, served):
    with serving(served(model="fake?no_template=1")) as harness:
        harness.wait_ready()
        error = harness.chat("x").json()["error"]
        assert error["code"] == "chat_template_missing"
        assert "/v1/completions" in error["message"]
