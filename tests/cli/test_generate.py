"""`octavo generate`: what reaches the model, and what reaches standard output and standard error."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest

from octavo.cli.main import main
from octavo.settings import SamplingParams
from octavo.types import FinishReason

SYSTEM_AND_USER = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]


def test_the_text_alone_on_standard_output_and_one_line_of_facts(cli):
    done = cli("generate", "hello")
    assert (done.code, done.out) == (0, "The sky is blue.\n")
    assert done.err_lines == [
        "fake, int8 from q4_1 on cpu (reference runner; auto found no usable GPU: none), load 0.25 s, "
        "weights + kv 4 MiB: 3 prompt + 4 new tokens, 12.5 tok/s, first token 0.50 s, seed 7"
    ]
    assert cli.llm.closed == 1


@pytest.mark.parametrize(
    ("arguments", "stdin", "prompt"),
    [
        (["hello"], None, "hello"),
        (["hello"], b"not read", "hello"),
        (["-"], b"hello\n", "hello"),
        ([], b"hello\r\n", "hello"),
        ([], b"hello\n\n", "hello\n"),
        ([], "\ufeffdéjà vu 🎉".encode(), "déjà vu 🎉"),
        (["--file", "prompt.txt"], b"not read", "from a file"),
        (["--", "--help"], None, "--help"),
        (["  spaces  "], None, "  spaces  "),
    ],
)
def test_where_the_prompt_comes_from(cli, arguments, stdin, prompt):
    Path("prompt.txt").write_text("from a file\n", encoding="utf-8")
    assert cli("generate", "--raw", *arguments, stdin=stdin).code == 0
    assert cli.llm.asked == [("raw", prompt, SamplingParams())]


@pytest.mark.parametrize(
    ("arguments", "template", "kind", "prompt"),
    [
        ([], True, "chat", SYSTEM_AND_USER[1:]),
        ([], False, "raw", "hello"),
        (["--raw"], True, "raw", "hello"),
        (["--system", "Be brief."], True, "chat", SYSTEM_AND_USER),
    ],
)
@pytest.mark.parametrize("form", [[], ["--json"], ["--no-stream"]])
def test_an_instruct_model_gets_its_template(cli, arguments, template, kind, prompt, form):
    cli.llm.has_chat_template = template
    assert cli("generate", "hello", *arguments, *form).code == 0
    assert [(asked[0], asked[1]) for asked in cli.llm.asked] == [(kind, prompt)]


def test_a_system_message_without_a_template_is_refused(cli):
    """With a remedy that works: --raw would not, because it contradicts --system."""
    cli.llm.has_chat_template = False
    done = cli("generate", "hello", "--system", "Be brief.")
    assert (done.code, done.out, len(done.err_lines)) == (6, "", 2)
    assert "Leave --system out" in done.err_lines[1]


@pytest.mark.parametrize(
    ("words", "flags", "asked"),
    [(1, [], 32), (40, [], 24), (64, [], None), (1, ["--max-new-tokens", "60"], 60), (1, ["--raw"], None)],
)
def test_an_answer_has_a_default_length_that_fits(cli, monkeypatch, words, flags, asked):
    """`LLM.chat` alone would take all that is left of the context; a raw prompt has `LLM.generate`'s default."""
    monkeypatch.setattr("octavo.frontend.DEFAULT_MAX_NEW_TOKENS", 32)
    assert cli("generate", "word " * words, *flags).code == 0
    assert cli.llm.asked[0][2].max_new_tokens == asked


def test_flags_reach_the_model(cli):
    flags = "-m org/name --quant int8 --device cuda:1 --context 128 --threads 2 --no-cache --offline"
    sampling = "--temperature 0.5 --top-k 4 --seed 1 --stop a --stop b --ignore-eos --max-new-tokens 8"
    assert cli("generate", "hello", *flags.split(), *sampling.split()).code == 0
    (settings,) = cli.llm.loads
    assert (settings.model, settings.quant, settings.device) == ("org/name", "int8", "cuda:1")
    assert (settings.context, settings.threads, settings.cache, settings.offline) == (128, 2, False, True)
    assert cli.llm.asked[0][2] == SamplingParams(
        temperature=0.5, top_k=4, seed=1, stop=("a", "b"), ignore_eos=True, max_new_tokens=8
    )


def test_no_stream_prints_the_same(cli):
    assert cli("generate", "hello", "--no-stream").out == cli("generate", "hello").out


def test_json_is_one_object_with_all_facts(cli):
    done = cli("generate", "hello", "--json")
    facts = json.loads(done.out)
    assert facts["text"] == "The sky is blue."
    assert facts["finish_reason"] == "stop"
    assert facts["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "cached_tokens": 0,
        "total_tokens": 7,
    }
    assert facts["timings"] == {
        "load_seconds": 0.25,
        "queued_seconds": 0.0,
        "first_token_seconds": 0.5,
        "total_seconds": 1.0,
        "prefill_tokens_per_second": 6.0,
        "decode_tokens_per_second": 12.5,
    }
    assert (facts["seed"], facts["model"], facts["quant"], facts["memory"]["kv"]) == (
        7,
        "fake",
        "int8",
        1 << 20,
    )
    assert "load_seconds" not in facts
    assert len(done.err_lines) == 1


def test_notices_come_before_the_facts(cli):
    cli.llm.notices = ("the packed weights were damaged and are made again",)
    done = cli("generate", "hello")
    assert done.err_lines[0] == cli.llm.notices[0]
    assert len(done.err_lines) == 2


def test_progress_is_shown_on_a_terminal_only(cli, monkeypatch):
    monkeypatch.setattr("octavo.cli.progress._PATIENCE_SECONDS", 0.0)
    assert "loading" in cli("generate", "hello", terminal=True).err
    assert "loading" not in cli("generate", "hello").err


def test_a_short_load_shows_no_bar(cli):
    assert "loading" not in cli("generate", "hello", terminal=True).err


def test_a_terminal_is_not_shown_control_characters(cli):
    cli.llm.answer = "red \x1b[31m text\ttab"
    assert cli("generate", "hello", terminal=True).out == "red \ufffd[31m text\ttab\n"
    assert cli("generate", "hello").out == "red \x1b[31m text\ttab\n"


def test_no_escape_codes_but_on_a_terminal(cli, monkeypatch):
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b" not in cli("generate", "hello").err
    assert "\x1b" in cli("generate", "hello", terminal=True).err


@pytest.mark.parametrize("no_color", [True, False])
def test_no_color_is_respected_on_a_terminal(cli, monkeypatch, no_color):
    monkeypatch.setenv("TERM", "xterm-256color")
    if not no_color:
        monkeypatch.delenv("NO_COLOR")
    red = "31m" in cli("generate", "--nonsense", terminal=True).err
    assert red is not no_color


def test_a_closed_pipe_ends_quietly(cli, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["generate", "hello"]) == 0
    assert cli.llm.closed == 1


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.STOP])
@pytest.mark.parametrize("arguments", [["--regex", "a+"], ["--json-object"], []])
def test_a_grammar_that_was_cut_is_said(cli, monkeypatch, reason, arguments):
    made = type(cli.llm)._done
    monkeypatch.setattr(
        cli.llm, "_done", lambda *a: dataclasses.replace(made(cli.llm, *a), finish_reason=reason)
    )
    said = "the grammar was not finished: raise --max-new-tokens"
    cut = reason is FinishReason.LENGTH and bool(arguments)
    assert (said in cli("generate", "hello", *arguments).err_lines) == cut
    assert (said in json.loads(cli("generate", "hello", *arguments, "--json").out)["notices"]) == cut


def test_a_filter_that_ended_the_answer_is_in_the_facts(cli, monkeypatch):
    made = type(cli.llm)._done
    ended = {"finish_reason": FinishReason.CONTENT_FILTER, "notices": ("error: the output filter failed",)}
    monkeypatch.setattr(cli.llm, "_done", lambda *a: dataclasses.replace(made(cli.llm, *a), **ended))
    *said, facts = cli("generate", "hello").err_lines
    assert said == ["error: the output filter failed"]
    assert "content_filter" in facts


@pytest.mark.parametrize("name", ["LOGPROBS", "PROMPT_LOGPROBS"])
def test_a_variable_without_effect_is_refused(cli, monkeypatch, name):
    monkeypatch.setenv(f"OCTAVO_{name}", "2")
    done = cli("generate", "hello")
    assert (done.code, done.out) == (2, "")
    assert f"OCTAVO_{name}" in done.err_lines[0]
    assert cli("generate", "hello", "--json").code == 0


@pytest.mark.parametrize(
    ("name", "told"), [("FOO", True), ("API_KEY", False), ("TEST_FOO", False), ("DEBUG", False)]
)
def test_a_variable_that_is_no_setting_is_told_of(cli, monkeypatch, name, told):
    monkeypatch.setenv(f"OCTAVO_{name}", "1")
    done = cli("generate", "hello")
    assert done.code == 0
    assert (f"OCTAVO_{name} is not a setting, and was ignored" in done.err_lines) == told


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(("done_bytes", "times"), [(0, 1), (2 << 20, 0)])
def test_a_download_is_announced_once(cli, monkeypatch, terminal, done_bytes, times):
    def load(settings, *, progress):
        cli.llm.loads.append(settings)
        for _ in range(3):
            progress("downloading", done_bytes, 2 << 20)
        return cli.llm

    monkeypatch.setattr(cli.llm, "from_settings", load)
    assert cli("generate", "hello", terminal=terminal).err.count("downloading the model, 2 MiB") == times
