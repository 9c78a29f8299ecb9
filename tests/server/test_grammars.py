"""Structured output over HTTP, and grammars meant to do harm (figure 25)."""

from __future__ import annotations

import json
import queue
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import openai
import pytest
from pydantic import BaseModel

pytestmark = pytest.mark.model

CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "people": {"type": "integer", "minimum": 0, "maximum": 99_999_999},
    },
    "required": ["name", "people"],
    "additionalProperties": False,
}


def test_a_schema_is_followed(default_server):
    for stream in (False, True):
        response_format = {
            "type": "json_schema",
            "json_schema": {"name": "city", "strict": True, "schema": CITY},
        }
        response = default_server.chat(
            "Describe a city as JSON.",
            response_format=response_format,
            max_tokens=100,
            temperature=1,
            seed=3,
            stream=stream,
        )
        assert response.status_code == 200, response.text
        if stream:
            lines = [
                json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")
            ]
            text = "".join(line["choices"][0]["delta"].get("content", "") for line in lines)
            reason = lines[-1]["choices"][0]["finish_reason"]
        else:
            choice = response.json()["choices"][0]
            text, reason = choice["message"]["content"], choice["finish_reason"]
        assert reason == "stop"
        jsonschema.validate(json.loads(text), CITY)


def test_parse(default_server):
    class City(BaseModel):
        name: str
        large: bool

    with openai.OpenAI(base_url=f"{default_server.url}/v1", api_key="x", timeout=60) as client:
        messages = [{"role": "user", "content": "Describe Berlin as JSON."}]
        answer = client.chat.completions.parse(
            model="smollm2", messages=messages, response_format=City, max_tokens=200, temperature=0
        )
        assert isinstance(answer.choices[0].message.parsed, City)
        parsed = client.responses.parse(
            model="smollm2",
            input="Describe Berlin as JSON.",
            text_format=City,
            max_output_tokens=200,
            temperature=0,
        )
        assert isinstance(parsed.output_parsed, City)


def test_regex_lark_and_json_object(default_server):
    def text(response_format):
        answer = default_server.chat(
            "Answer.", response_format=response_format, max_tokens=60, temperature=0.8, seed=5
        )
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]

    assert re.fullmatch(r"(yes|no), [0-9]{3}", text({"type": "regex", "regex": r"(yes|no), [0-9]{3}"}))
    assert text({"type": "grammar", "grammar": 'start: "left" | "right"'}) in ("left", "right")
    assert text({"type": "json_object"}).startswith("{")


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "regex", "regex": "(" * 30_000 + "a" + ")" * 30_000},
        {"type": "regex", "regex": "(unclosed"},
        {"type": "regex", "regex": "a" * 70_000},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}},
        {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"not": {"type": "string"}}},
        },
        {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"enum": [f"v{n}" for n in range(20_000)]}},
        },
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "grammar", "grammar": "start: missing"},
        {"type": "grammar"},
        {"type": "xml"},
    ],
    ids=lambda value: f"{value['type']} {str(value)[25:60]}",
)
def test_what_is_no_grammar_is_a_400(default_server, response_format):
    started = time.perf_counter()
    response = default_server.chat("x", response_format=response_format)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith("response_format")
    assert time.perf_counter() - started < 10
    assert default_server.service.models.state("smollm2") == "ready"


BOMBS = [
    {"type": "regex", "regex": "(a+)+b"},
    {"type": "regex", "regex": "((a{1,100}){1,100}){1,100}"},
    {"type": "regex", "regex": ".*a.{200}"},
    {"type": "regex", "regex": "|".join(f"w{n}x" for n in range(6000))},
    {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
    },
    {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "(a{1,1000}){1,1000}"}},
    },
    {
        "type": "json_schema",
        "json_schema": {
            "name": "x",
            "schema": {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(1000)}},
        },
    },
    {"type": "grammar", "grammar": 'start: a\na: a a | "x" | \n'},
]


def test_grammar_bombs_hold_up_nobody(default_server, check_idle):
    """Each is answered, with 200 or 400, while a neighbour's stream goes on."""
    gaps: list[float] = []

    def neighbour() -> None:
        body = {
            "model": "smollm2",
            "messages": [{"role": "user", "content": "Count."}],
            "max_tokens": 300,
            "stream": True,
        }
        with default_server.client.stream(
            "POST", "/v1/chat/completions", json={**body, "ignore_eos": True}
        ) as response:
            last = time.perf_counter()
            for _ in response.iter_lines():
                gaps.append(time.perf_counter() - last)
                last = time.perf_counter()

    thread = threading.Thread(target=neighbour)
    thread.start()
    for bomb in BOMBS:
        started = time.perf_counter()
        response = default_server.chat("x", response_format=bomb, max_tokens=4)
        assert response.status_code in (200, 400), response.text
        assert time.perf_counter() - started < 10
    thread.join()
    assert max(gaps[5:]) < 3
    check_idle(default_server)


def test_grammars_that_take_their_time_hold_up_only_each_other(default_server, monkeypatch):
    compiled, waiting = threading.Event(), queue.SimpleQueue()
    checker = default_server.service.models.resident("smollm2").confined._checker
    monkeypatch.setattr(checker, "check", lambda grammar: waiting.put(grammar) or compiled.wait(20))
    with ThreadPoolExecutor(6) as threads:
        regex = {"type": "regex", "regex": "a"}
        slow = [threads.submit(default_server.chat, "x", response_format=regex) for _ in range(6)]
        try:
            while waiting.qsize() < 4:
                time.sleep(0.01)
            assert default_server.chat("x", max_tokens=1).status_code == 200
            assert not any(each.done() for each in slow)
        finally:
            compiled.set()
        assert {each.result().status_code for each in slow} == {200}
