"""Figures 24 and 35 at the server: text is the same streamed or not, and a hostile template harms nobody."""

from __future__ import annotations

import json
import random
import time
from urllib.parse import quote

import pytest

ALPHABET = 'aé世🎉👩‍👩‍👧\u0301\u200d\n\t "\\{}<|im_end|>﷽\U0001f1e9\U0001f1ea'


def streamed(response) -> tuple[str, dict[str, int]]:
    text, usage = "", {}
    for block in response.text.split("\n\n"):
        if block.startswith("data: {"):
            chunk = json.loads(block[6:])
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                text += choice["delta"].get("content", "")
    return text, usage


@pytest.mark.parametrize(
    "count", [30, pytest.param(10_000, marks=[pytest.mark.soak, pytest.mark.timeout(7200)])]
)
def test_a_stream_is_the_whole_text(fake, count):
    """The model's tokens are single bytes: every character beyond ASCII is cut at each of its bytes."""
    pick = random.Random(4)
    for _ in range(count):
        text = "".join(pick.choice(ALPHABET) for _ in range(pick.randrange(1, 30))) + "!stop"
        options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 200}
        found, usage = streamed(fake.chat(text, **options))
        whole = fake.chat(text, max_tokens=200).json()
        assert found == whole["choices"][0]["message"]["content"] == text
        assert usage == whole["usage"]
        assert "\ufffd" not in found


def test_a_character_cut_by_max_tokens_is_marked(fake):
    """What was never completed is one U+FFFD, streamed or not."""
    text = "世!stop"
    whole = fake.chat(text, max_tokens=2).json()["choices"][0]["message"]["content"]
    assert whole == "\ufffd" == streamed(fake.chat(text, max_tokens=2, stream=True))[0]


BOMBS = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "repeat": "{{ 'x' * 2000000000 }}",
    "padding": "{{ '%2000000000d' % 1 }}",
    "doubling": "{% set n = namespace(x='xx') %}{% for i in range(64) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "join": "{{ (['x' * 100000] * 100000) | join }}",
    "power": "{{ 9 ** 99999999 }}",
    "format": "{{ '{:>2000000000}'.format(1) }}",
    "lists": "{% set n = namespace(x=[1]) %}{% for i in range(64) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "import": "{% import 'os' as os %}{{ os }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "raise": "{{ raise_exception('no') }}",
    "syntax": "{% for %}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_hostile_template_is_a_400_and_health_goes_on(serving, served, health_probe, name):
    # A template that does not compile is a model that does not load: alone it would end the server.
    preload = name != "syntax"
    with serving(served(model=f"fake?template={quote(BOMBS[name])}"), preload=preload) as harness:
        if preload:
            harness.wait_ready()
        started = time.perf_counter()
        with health_probe(harness) as lags:
            response = harness.chat("x")
        spent = time.perf_counter() - started
        assert response.status_code == 400, response.text
        assert response.json()["error"]["code"] in ("template_error", "invalid_value")
        assert spent < 10
        assert lags[len(lags) // 2] < 1.5  # on a machine that runs other tests beside
