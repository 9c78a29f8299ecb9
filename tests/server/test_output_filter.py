"""The output filter sees text before anybody else, whole over the borders of tokens; if it fails, nothing is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo import LLM, SamplingParams
from octavo.errors import UsageError
from octavo.output_filter import FilteredText, Keep, Replace, Stop, load_filter


def test_names_that_are_no_filter_are_refused():
    for name in ("json", "json:nothing", "nothing_here:f", "json:__doc__", ":f", ""):
        with pytest.raises(UsageError):
            load_filter(name)
    assert load_filter("json:dumps") is json.dumps


@given(st.text("secrt x", max_size=60), st.lists(st.integers(1, 7), max_size=60))
def test_a_phrase_is_found_however_the_text_is_cut(text, cuts):
    def mask(held, last):
        return Replace(held.replace("secret", "******")) if "secret" in held else Keep()

    mask.hold_back = 6
    filtered, shown, rest = FilteredText(mask), "", text
    for size in cuts:
        piece, rest = rest[:size], rest[size:]
        shown += filtered.push(piece, last=False)[0]
        assert "secret" not in shown
    shown += filtered.push(rest, last=True)[0]
    assert shown == text.replace("secret", "******")


@pytest.mark.model
def test_in_python(default_model_path):
    def cut(text, last):
        return Stop() if len(text) > 5 else Keep()

    with LLM(default_model_path, device="cpu", context=64, filter=cut) as llm:
        done = llm.generate("Once upon a time", SamplingParams(max_new_tokens=20, seed=1))
        assert (done.finish_reason, done.text) == ("content_filter", "")
        assert done.notices == ()


def test_a_filter_that_fails_says_so_without_the_text():
    def broken(text, last):
        raise TypeError(text)

    filtered = FilteredText(broken)
    assert filtered.push("secret", last=False) == ("", True)
    assert filtered.notices == ("error: the output filter failed (TypeError): the answer was stopped",)


@pytest.mark.parametrize(
    ("name", "shown", "reason"),
    [
        ("mask", "say ****** word!stop", "stop"),
        ("cut", "say ", "content_filter"),
        ("broken", None, "content_filter"),
    ],
)
def test_at_the_server(serving, served, monkeypatch, name, shown, reason):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    with serving(served(filter=f"filters:{name}")) as harness:
        harness.wait_ready()
        choice = harness.chat("say secret word!stop").json()["choices"][0]
        assert choice["finish_reason"] == reason
        text = choice["message"]["content"]
        assert "secret" not in text
        assert shown is None or text == shown
        stream = harness.chat("say secret word!stop", stream=True).text
        assert "secret" not in "".join(
            json.loads(line[6:])["choices"][0]["delta"].get("content", "")
            for line in stream.split("\n\n")
            if line.startswith("data: {")
        )
        assert f'"finish_reason":"{reason}"' in stream
        assert harness.chat("nothing hidden!stop").json()["choices"][0]["finish_reason"] == "stop"
        assert harness.chat("x", logprobs=True).json()["error"]["param"] == "logprobs"
