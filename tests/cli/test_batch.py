"""`octavo generate --batch`: one result a line, in order, and a bad line fails alone."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from octavo.errors import NumericalError
from octavo.settings import SamplingParams


def run(cli: Any, *lines: Any, flags: tuple[str, ...] = ()) -> tuple[list[dict[str, Any]], Any]:
    data = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    Path("in.jsonl").write_bytes(data)
    done = cli("generate", "--batch", "in.jsonl", *flags)
    return [json.loads(line) for line in done.out.splitlines()], done


def test_results_are_in_order_with_their_ids(cli):
    results, done = run(cli, {"prompt": "a", "id": "first"}, {"prompt": "b"}, b"", {"prompt": "c", "id": 9})
    assert [result["id"] for result in results] == ["first", 1, 9]
    assert results[0]["text"] == "The sky is blue."
    assert results[0]["usage"]["total_tokens"] == 7
    assert done.code == 0
    (facts,) = done.err_lines
    assert "weights + kv 4 MiB: 3 lines, 9 prompt + 12 new tokens in " in facts
    assert cli.llm.closed == 1


def test_results_are_in_order_when_several_run_at_once(cli, monkeypatch):
    chat = cli.llm.chat

    def slow_at_first(messages, params):
        time.sleep(0.05 / (1 + len(cli.llm.asked)))
        return chat(messages, params)

    monkeypatch.setattr(cli.llm, "chat", slow_at_first)
    results, _ = run(cli, *({"prompt": str(i)} for i in range(20)), flags=("--max-sequences", "4"))
    assert [result["id"] for result in results] == list(range(20))


def test_sampling_fields_stand_over_those_of_the_command_line(cli):
    flags = ("--raw", "--temperature", "0.5", "--seed", "1")
    run(cli, {"prompt": "a", "seed": 2, "stop": ["x"], "logit_bias": {"3": 1}}, {"prompt": "b"}, flags=flags)
    params = [params for _, _, params in cli.llm.asked]
    assert params[0] == SamplingParams(temperature=0.5, seed=2, stop=("x",), logit_bias={3: 1.0})
    assert params[1] == SamplingParams(temperature=0.5, seed=1)


def test_prompts_and_messages(cli):
    turns = [{"role": "user", "content": "hi"}]
    system = {"role": "system", "content": "s"}
    own = [{"role": "system", "content": "own"}, *turns]
    run(cli, {"messages": turns}, {"messages": own}, {"prompt": "a"}, flags=("--system", "s"))
    run(cli, {"prompt": "a"}, {"messages": turns}, flags=("--raw",))
    assert [(kind, prompt) for kind, prompt, _ in cli.llm.asked] == [
        ("chat", [system, *turns]),
        ("chat", own),
        ("chat", [system, {"role": "user", "content": "a"}]),
        ("raw", "a"),
        ("chat", turns),
    ]


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (b"nonsense", "usage", "not JSON"),
        (b"[" * 100_000, "usage", "not JSON"),
        (b"[1]", "usage", "not a JSON object"),
        (b'{"prompt": "caf\xe9"}', "not_text", "not UTF-8"),
        (b'{"prompt": "\\ud800"}', "not_text", "surrogate"),
        ({"id": 1}, "usage", "prompt or messages"),
        ({"prompt": "a", "messages": []}, "usage", "not both"),
        ({"prompt": 5}, "invalid_parameter", "prompt is 5"),
        ({"prompt": "a", "temprature": 1}, "usage", "temprature"),
        ({"prompt": "a", "seed": "1"}, "invalid_parameter", 'seed is "1"'),
        ({"prompt": "a", "stop": "x"}, "invalid_parameter", "stop"),
        ({"messages": [{"role": 1}]}, "invalid_parameter", "messages"),
    ],
)
def test_a_bad_line_fails_alone(cli, line, code, said):
    results, done = run(cli, {"prompt": "a"}, line, {"prompt": "b"})
    assert [set(result) & {"text", "error"} for result in results] == [{"text"}, {"error"}, {"text"}]
    error = results[1]["error"]
    assert (error["code"], set(error)) == (code, {"code", "message", "remedy"})
    assert said in error["message"]
    assert (done.code, len(cli.llm.asked)) == (7, 2)
    assert done.err_lines[1:] == ["error: 1 of 3 lines failed", "  fix: See the error objects in the output."]


def test_a_request_that_fails_fails_alone(cli):
    cli.llm.errors.append(NumericalError("NaN", remedy="report it"))
    results, done = run(cli, {"prompt": "a", "id": "x"}, {"prompt": "b"})
    assert results[0] == {
        "id": "x",
        "error": {"code": "numerical_error", "message": "NaN", "remedy": "report it"},
    }
    assert results[1]["text"]
    assert done.code == 7


def test_a_wrong_value_is_not_quoted_in_full(cli):
    results, _ = run(cli, {"prompt": ["word"] * 1000})
    assert len(results[0]["error"]["message"]) < 120


def test_a_misspelled_field_gets_the_close_name(cli):
    results, _ = run(cli, {"prompt": "a", "temprature": 1})
    assert results[0]["error"]["remedy"] == "Did you mean temperature?"


def test_an_interrupt_ends_it_with_what_was_done(cli, monkeypatch):
    chat = cli.llm.chat

    def interrupted(messages, params):
        if len(cli.llm.asked) == 2:
            raise KeyboardInterrupt
        return chat(messages, params)

    monkeypatch.setattr(cli.llm, "chat", interrupted)
    results, done = run(cli, *({"prompt": str(i)} for i in range(9)))
    assert ([result["id"] for result in results], done.code) == ([0, 1], 130)
    assert cli.llm.closed == 1


def test_an_empty_file_is_an_error(cli):
    _, done = run(cli, b"\n")
    assert (done.code, done.out, len(done.err_lines)) == (7, "", 2)
    assert not cli.llm.loads
