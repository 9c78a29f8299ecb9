"""POST /v1/completions: prompts of every form, echo, and the scores evaluation harnesses read."""

from __future__ import annotations

import dataclasses
import json

import pytest

from octavo.server.prepare import _salted
from octavo.settings import SamplingParams
from octavo.types import Request, Sampling


def test_a_raw_continuation(fake):
    answer = fake.complete("abc", max_tokens=5).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["text"] == "abcab"
    assert answer["choices"][0]["finish_reason"] == "length"


def test_sixteen_tokens_unless_asked(fake):
    assert fake.complete("abc").json()["usage"]["completion_tokens"] == 16
    assert fake.complete("a" * 500).json()["usage"]["completion_tokens"] == 12


def test_what_the_server_was_told_goes_before_sixteen_tokens(serving, served):
    model = dataclasses.replace(served(), sampling=SamplingParams(max_new_tokens=5))
    with serving(model) as harness:
        harness.wait_ready()
        assert harness.complete("abc").json()["usage"]["completion_tokens"] == 5
        assert harness.complete("a" * 509).json()["usage"]["completion_tokens"] == 3
        assert harness.complete("abc", max_tokens=7).json()["usage"]["completion_tokens"] == 7
        scored = harness.complete("abc", max_tokens=0, echo=True, logprobs=1).json()
        assert scored["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["abab"]),
        ([97, 98], ["abab"]),
        (["ab", "xy"], ["abab", "xyxy"]),
        ([[97, 98], [120, 121]], ["abab", "xyxy"]),
    ],
)
def test_prompts_of_every_form(fake, prompt, texts):
    answer = fake.complete(prompt, max_tokens=4).json()
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(texts)))


def test_choices_of_several_prompts_follow_each_other(fake):
    answer = fake.complete(["ab", "xy"], max_tokens=2, n=2).json()
    assert [choice["text"] for choice in answer["choices"]] == ["ab", "ab", "xy", "xy"]
    assert answer["usage"]["prompt_tokens"] == 4
    assert answer["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_the_prompt(fake, max_tokens):
    """The pattern of evaluation harnesses: echo, logprobs 1, max_tokens 0 or 1, token ids."""
    answer = fake.complete([[104, 105, 33]], echo=True, logprobs=1, max_tokens=max_tokens, seed=1234).json()
    choice = answer["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == "hi!" + "h" * max_tokens
    assert logprobs["tokens"] == ["h", "i", "!", "h"][: 3 + max_tokens]
    assert logprobs["token_logprobs"] == [None, -1.0, -1.0, -0.5][: 3 + max_tokens]
    assert logprobs["text_offset"] == [0, 1, 2, 3][: 3 + max_tokens]
    assert logprobs["top_logprobs"][1] == {"i": -1.0}
    assert answer["usage"]["completion_tokens"] == max_tokens


def test_no_tokens_without_echo_is_refused(fake):
    assert fake.complete("a", max_tokens=0).json()["error"]["param"] == "max_tokens"


def test_echo_streams_the_prompt_first(fake):
    text = fake.complete("abc", echo=True, max_tokens=3, stream=True).text
    chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abcabc"
    assert chunks[0]["choices"][0]["text"].startswith("abc")
    assert text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": ["a"] * 64, "n": 2}, "n"),
        ({"prompt": "a", "n": 17}, "n"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({}, "prompt"),
    ],
)
def test_what_is_over_a_limit_is_named(fake, body, param):
    """Figure 6: over a cap 400 with `param`."""
    response = fake.client.post("/v1/completions", json={"model": "fake", "max_tokens": 1, **body})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ["a"] * 64},
        {"prompt": "a", "n": 16},
        {"prompt": "a", "logprobs": 20},
        {"prompt": "a", "stop": ["x"] * 16},
    ],
)
def test_what_is_at_a_limit_is_honoured(fake, body):
    """Figure 6: at the cap 200."""
    assert (
        fake.client.post("/v1/completions", json={"model": "fake", "max_tokens": 1, **body}).status_code
        == 200
    )


@pytest.mark.parametrize("prompt", [[], [[]], "", [259], [-1], [2**31], [2**63], [[97], [300]]])
def test_ids_outside_the_vocabulary_and_empty_prompts_are_refused(fake, prompt):
    response = fake.complete(prompt)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_keys_and_salts_separate_prefixes():
    """Figure 31: requests with different keys, or salts, share no prefix."""
    request = Request((1, 2), Sampling(), 1)
    salts = [_salted(request, key, asked).salt for key in ("", "k1", "k2") for asked in (None, "a", "b")]
    assert len(set(salts)) == 9
    assert salts[0] == ""
    assert _salted(request, "k1", "a").salt == salts[4]
