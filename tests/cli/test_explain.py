"""`octavo explain`, and what generate shows of choices and grammars, on the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from octavo.nvml import CardProcess, CardState
from octavo.settings import SamplingParams

FACTS = {
    "model": "fake",
    "revision": None,
    "device": {"name": "cpu", "reason": "as asked", "card": None},
    "runner": {
        "name": "cpu",
        "layout": "cpu-r8-1",
        "threads": 2,
        "compute_dtype": "float32",
        "kv_dtype": "float16",
        "kernels": {"int8 linears": "AVX2, int16 activations"},
        "batch_invariant": True,
        "chunk_invariant": True,
    },
    "layers": [
        {"layers": "layers 0 to 1", "what": "Attention [2 heads]", "formats": ["int8"], "device": "cpu"}
    ],
    "counters": {"steps": 3, "pages": {"total": [4]}},
    "compiled": {"graphs": 0},
    "reasons": ["device cpu: as asked"],
    "speculation": "off, as asked",
}


@pytest.fixture
def explained(cli, monkeypatch):
    monkeypatch.setattr(type(cli.llm), "explain", lambda self: FACTS, raising=False)
    return cli


def test_explain_shows_every_part(explained):
    done = explained("explain", "some/model")
    assert done.code == 0
    for said in (
        "AVX2, int16 activations",
        "layers 0 to 1",
        "Attention [2 heads]",
        "steps",
        "pages total",
        "[4]",
    ):
        assert said in done.out
    assert "- speculation: off, as asked" in done.out
    assert "in any batch, however a prompt is cut" in done.out
    assert (explained.llm.loads[0].model, explained.llm.asked, explained.llm.closed) == ("some/model", [], 1)


def test_explain_says_who_else_is_on_the_card(explained, monkeypatch):
    state = CardState(80 << 30, 30 << 30, (CardProcess(8, 18 << 30), CardProcess(9, None)), 12.345)
    facts = {**FACTS, "device": {"name": "cuda:0", "reason": "as asked", "card": state.to_json()}}
    monkeypatch.setattr(type(explained.llm), "explain", lambda self: facts)
    out = explained("explain", "some/model").out
    for said in ("30.0 GiB of 80.0 GiB free", "process 8", "18.0 GiB", "an unknown amount", "12 J since"):
        assert said in out


def test_explain_as_json_and_after_a_run(explained):
    done = explained("explain", "--json", "--run")
    assert json.loads(done.out) == json.loads(json.dumps(FACTS))
    ((_, prompt, params),) = explained.llm.asked
    assert len(prompt) + params.max_new_tokens <= explained.llm.context_tokens
    assert (params.temperature, params.ignore_eos) == (0, True)


# --- choices -------------------------------------------------------------------------------------------------


@pytest.fixture
def three(cli, monkeypatch):
    def events(done):
        for choice in (1, 0, 2):
            each = dataclasses.replace(done, text=f"answer {choice}", choice=choice)
            yield next(iter(type(cli.llm)._events(cli.llm, each)))
            yield dataclasses.replace(
                list(type(cli.llm)._events(cli.llm, each))[-1], completion=each, choice=choice
            )

    monkeypatch.setattr(cli.llm, "_events", events)
    return cli


def test_choices_are_printed_in_their_order(three):
    done = three("generate", "hello", "--n", "3")
    assert done.out == "answer 0\nanswer 1\nanswer 2\n"
    assert [line.partition(":")[0] for line in done.err_lines[:3]] == [f"choice {i} of 3" for i in (1, 2, 3)]


def test_choices_as_json(three):
    facts = json.loads(three("generate", "hello", "--n", "3", "--json").out)
    assert facts["text"] == "answer 0"
    assert [(each["choice"], each["text"]) for each in facts["choices"]] == [
        (i, f"answer {i}") for i in range(3)
    ]
    assert "others" not in facts
    assert "choices" not in facts["choices"][0]


def test_one_choice_has_no_list_of_them(cli):
    facts = json.loads(cli("generate", "hello", "--json").out)
    assert "choices" not in facts
    assert "others" not in facts


def test_a_chat_has_one_answer(cli):
    done = cli("chat", "--n", "2", stdin=b"")
    assert (done.code, len(done.err_lines)) == (2, 2)
    assert "n is 2" in done.err_lines[0]


# --- grammars ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "params"),
    [
        (["--json-schema", '{"type": "object"}'], SamplingParams(json_schema='{"type": "object"}')),
        (["--json-schema", ' {"type": "object"}'], SamplingParams(json_schema=' {"type": "object"}')),
        (["--json-schema", "schema.json"], SamplingParams(json_schema='{"type": "null"}')),
        (["--grammar", "rules.lark"], SamplingParams(lark='start: "é"')),
        (["--regex", "a+"], SamplingParams(regex="a+")),
        (["--json-object"], SamplingParams(json_object=True)),
        (
            ["--json", "--logprobs", "2", "--prompt-logprobs", "1"],
            SamplingParams(logprobs=2, prompt_logprobs=1),
        ),
    ],
)
def test_grammar_flags_reach_the_model(cli, flags, params):
    Path("schema.json").write_text('{"type": "null"}')
    Path("rules.lark").write_text('start: "é"', encoding="utf-8")
    assert cli("generate", "--raw", "hello", *flags).code == 0
    assert cli.llm.asked[0][2] == params


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--json-schema", "missing.json"], "missing.json"),
        (["--grammar", "missing.lark"], "missing.lark"),
        (["--grammar", "bytes"], "not UTF-8"),
        (["--json-schema", "{"], "json_schema is not JSON"),
        (["--json-object", "--regex", "a"], "json_object and regex"),
        (["--regex", "a", "--ignore-eos"], "regex and ignore_eos"),
        (["--n", "0"], "n is 0"),
        (["--num-beams", "4"], "--num-beams is not supported"),
        (["--best-of", "4"], "--best-of is not supported"),
        (["--speculation", "on"], "--speculation"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(cli, flags, said):
    Path("bytes").write_bytes(b"\xff")
    done = cli("generate", "hello", *flags)
    assert (done.code in (2, 7), done.out, len(done.err_lines)) == (True, "", 2)
    assert said in done.err_lines[0]
    assert not cli.llm.loads
