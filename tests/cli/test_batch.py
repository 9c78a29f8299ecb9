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
    first = {"prompt": "a", "seed": 2, "stop": "x", "logit_bias": {"3": 1}, "json_schema": {"type": "object"}}
    run(cli, first, {"prompt": "b"}, flags=flags)
    params = [params for _, _, params in cli.llm.asked]
    assert params[0] == SamplingParams(
        temperature=0.5, seed=2, stop=("x",), logit_bias={3: 1.0}, json_schema={"type": "object"}
    )
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
        ({"prompt": "a", "stop": 5}, "invalid_parameter", "stop"),
        ({"prompt": "a", "num_beams": 4}, "usage", "num_beams is not supported"),
        ({"prompt": "a", "logits_processors": []}, "usage", "logits_processors"),
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


# --- the output file ---------------------------------------------------------------------------------------


def to_file(
    cli: Any, lines: list[Any], *flags: str, name: str = "out.jsonl"
) -> tuple[list[dict[str, Any]], Any]:
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = cli("generate", "--batch", "in.jsonl", "--output", name, *flags)
    return [json.loads(line) for line in Path(name).read_text().splitlines()], done


LINES = [{"prompt": str(i), "id": f"n{i}"} for i in range(6)]


def test_answers_go_to_the_file_alone(cli):
    results, done = to_file(cli, LINES)
    assert [result["id"] for result in results] == [f"n{i}" for i in range(6)]
    assert (done.code, done.out) == (0, "")


def test_a_second_run_asks_nothing_again(cli):
    before, _ = to_file(cli, LINES)
    asked = len(cli.llm.asked)
    after, done = to_file(cli, LINES)
    assert (after, len(cli.llm.asked), len(cli.llm.loads), done.code) == (before, asked, 1, 0)
    assert "6 of 6 lines are answered in out.jsonl already" in done.err


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_run_goes_on_where_one_was_killed_and_repairs_the_half_written_line(cli, cut):
    whole, _ = to_file(cli, LINES)
    data = Path("out.jsonl").read_bytes()
    third_ends = [i for i, byte in enumerate(data) if byte == 10][2]
    Path("out.jsonl").write_bytes(data[: third_ends + 1 + cut])
    asked = len(cli.llm.asked)
    results, done = to_file(cli, LINES)
    assert results == whole
    assert (len(cli.llm.asked) - asked, done.code) == (3, 0)
    assert {path.name for path in Path().iterdir()} == {"in.jsonl", "out.jsonl"}


def test_lines_that_failed_are_asked_again(cli):
    cli.llm.errors.append(NumericalError("NaN", remedy="report it"))
    first, done = to_file(cli, LINES)
    assert ("error" in first[0], done.code) == (True, 7)
    second, done = to_file(cli, LINES)
    assert sorted(result["id"] for result in second) == [line["id"] for line in LINES]
    assert (any("error" in result for result in second), done.code) == (False, 0)


def test_lines_without_an_id_are_known_by_their_place_and_equal_ids_by_their_number(cli):
    lines = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c", "id": "x"}, {"prompt": "d", "id": "x"}]
    to_file(cli, lines[:1])
    to_file(cli, lines[:3])
    results, _ = to_file(cli, lines)
    assert [result["id"] for result in results] == [0, 1, "x", "x"]
    assert [prompt[0]["content"] for _, prompt, _ in cli.llm.asked] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("data", [b"my notes\n", b'{"id": 1}\n', b"[1]\n", b'{"text": "a"}\n'])
def test_a_file_of_something_else_is_left_alone(cli, data):
    Path("notes.txt").write_bytes(data)
    Path("in.jsonl").write_text(json.dumps(LINES[0]))
    done = cli("generate", "--batch", "in.jsonl", "--output", "notes.txt")
    assert (done.code, Path("notes.txt").read_bytes()) == (2, data)
    assert "line 1 of notes.txt" in done.err
    assert not cli.llm.loads


def test_what_does_not_go_with_an_output_file(cli):
    Path("in.jsonl").write_text(json.dumps(LINES[0]))
    for arguments, said in [
        (["hello", "--output", "x"], "--output goes with --batch"),
        (["--batch", "in.jsonl", "--output", "./in.jsonl"], "both"),
        (["--batch", "in.jsonl", "--output", "no/such/folder"], "cannot use no/such/folder"),
    ]:
        done = cli("generate", *arguments)
        assert (done.code, len(done.err_lines)) == (2, 2), done
        assert said in done.err_lines[0]


def test_lines_from_standard_input(cli):
    data = "".join(json.dumps(line) + "\n" for line in LINES[:2]).encode()
    done = cli("generate", "--batch", "-", stdin=data)
    assert [json.loads(line)["id"] for line in done.out.splitlines()] == ["n0", "n1"]
    assert cli("generate", "--batch", "-", stdin=b"").code == 7


def test_a_lines_grammar_stands_in_for_that_of_the_command_line(cli):
    lines = [{"prompt": "a"}, {"prompt": "b", "json_object": True}]
    run(cli, *lines, flags=("--regex", "x+"))
    asked = [params for _, _, params in cli.llm.asked]
    assert [(params.regex, params.json_object) for params in asked] == [("x+", False), (None, True)]
