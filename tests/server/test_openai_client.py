"""OpenAI's own client, unmodified: sync, async, streams, retries, responses, and errors as its classes."""

from __future__ import annotations

import asyncio

import openai
import pytest


@pytest.fixture(scope="module")
def client(fake_module):
    with openai.OpenAI(base_url=f"{fake_module.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


MESSAGES = [{"role": "user", "content": "hello, 世界!stop"}]


def test_chat(fake, client):
    answer = client.chat.completions.create(
        model="fake", messages=MESSAGES, temperature=0.5, seed=1, user="me"
    )
    assert answer.choices[0].message.content == "hello, 世界!stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_what_extra_body_puts_at_the_top_is_taken(fake, client):
    more = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": False}
    answer = client.chat.completions.create(model="fake", messages=MESSAGES, extra_body=more)
    assert answer.choices[0].finish_reason == "stop"


def test_stream(fake, client):
    options = {"include_usage": True}
    with client.chat.completions.create(
        model="fake", messages=MESSAGES, stream=True, stream_options=options
    ) as stream:
        chunks = list(stream)
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        == "hello, 世界!stop"
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0


def test_stream_helper(fake, client):
    with client.chat.completions.stream(model="fake", messages=MESSAGES) as stream:
        assert any(event.type == "content.delta" for event in stream)
        done = stream.get_final_completion()
    assert done.choices[0].message.content == "hello, 世界!stop"


def test_logprobs(fake, client):
    answer = client.chat.completions.create(model="fake", messages=MESSAGES, logprobs=True, top_logprobs=1)
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].token == "h"


def test_completions(fake, client):
    answer = client.completions.create(model="fake", prompt=["ab", "cd"], max_tokens=3, logprobs=1, echo=True)
    assert [choice.text for choice in answer.choices] == ["ababa", "cdcdc"]
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    with client.completions.create(model="fake", prompt=[97, 98], max_tokens=4, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == "abab"


def test_models(fake, client):
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "octavo"


def test_responses(fake, client):
    answer = client.responses.create(model="fake", input="hello!stop", instructions="Be brief.")
    assert (answer.output_text, answer.status) == ("hello!stop", "completed")
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    short = client.responses.create(
        model="fake", input=[{"role": "user", "content": "hello"}], max_output_tokens=2
    )
    assert (short.output_text, short.status) == ("he", "incomplete")
    assert short.incomplete_details.reason == "max_output_tokens"


def test_responses_stream(fake, client):
    with client.responses.create(model="fake", input="hello, 世界!stop", stream=True) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "hello, 世界!stop"
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == "hello, 世界!stop"
    with client.responses.stream(model="fake", input="hello!stop") as helper:
        assert helper.get_final_response().output_text == "hello!stop"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "c"}, "conversation"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"prompt": {"id": "p"}}, "prompt"),
    ],
)
def test_what_needs_a_store_is_refused_by_name(fake, client, more, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="fake", input="x", **more)
    assert caught.value.param == param


def test_fields_of_an_input_message_are_known_or_refused(fake):
    message = {"type": "message", "role": "user", "content": "hi!stop"}
    body = {"model": "fake", "max_output_tokens": 8, "input": [{**message, "id": "m", "status": "completed"}]}
    assert fake.client.post("/v1/responses", json=body).status_code == 200
    for name in ("name", "foo"):
        body["input"] = [message, {**message, name: "x"}]
        response = fake.client.post("/v1/responses", json=body)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (
            400,
            "unsupported_parameter",
            f"input[1].{name}",
        )


def test_errors_are_its_classes(fake, client):
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="fake", messages=MESSAGES, temperature=1000)
    assert (bad.value.param, bad.value.code, bad.value.type) == (
        "temperature",
        "invalid_value",
        "invalid_request_error",
    )
    assert bad.value.request_id
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert missing.value.code == "model_not_found"


def test_an_error_in_a_stream_raises(fake, client):
    messages = [{"role": "user", "content": "!nan:9 !slow:20 x"}]
    stream = client.chat.completions.create(model="fake", messages=messages, stream=True)
    with stream, pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "numerical_error"


def test_a_request_that_is_at_fault_is_not_sent_again(fake):
    with openai.OpenAI(base_url=f"{fake.url}/v1", api_key="none", max_retries=2, timeout=30) as client:
        before = fake.engine()["submitted"]
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "!nan:2"}])
        assert fake.engine()["submitted"] == before + 1


def test_async_and_leaving_a_stream(fake, check_idle):
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{fake.url}/v1", api_key="none", timeout=30) as client:

            async def one(number: int) -> str:
                messages = [{"role": "user", "content": f"number {number}!stop"}]
                answer = await client.chat.completions.create(model="fake", messages=messages)
                return answer.choices[0].message.content

            texts = list(await asyncio.gather(*(one(number) for number in range(16))))
            messages = [{"role": "user", "content": "!slow:10 abc"}]
            stream = await client.chat.completions.create(model="fake", messages=messages, stream=True)
            async for _ in stream:
                break
            await stream.close()
            return texts

    assert asyncio.run(main()) == [f"number {number}!stop" for number in range(16)]
    check_idle(fake)
