"""The template dialect against transformers' renderer, hostile templates against the sandbox and its limits."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import pytest

from octavo.errors import ChatTemplateError, InvalidInputError
from octavo.text.chat import MAX_TEMPLATE_CHARACTERS, ChatTemplate
from octavo.text.tokenizer import Tokenizer
from octavo.types import Message

CHAT: list[Message] = [
    {"role": "system", "content": " Be brief.\n"},
    {"role": "user", "content": "  Hi <b>\n\n"},
    {"role": "assistant", "content": "<think>\nwell\n</think>\n\nHello! é 'x' \"y\" & {{ 7 * 7 }}"},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "[1, 2]\\n"},
    {"role": "user", "content": "{% raw %} Bye"},
]

DIALECT = {
    "blocks are trimmed": "{% for m in messages %}\n  {% if m.role == 'user' %}"
    "\nU:{{ m.content }}\n  {% endif %}\n{% endfor %}\n\n",
    "minus": "{%- for m in messages -%}  {{- m.content -}}  {%- endfor -%}",
    "break and continue": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}"
    "{% if loop.last %}{% break %}{% endif %}{{ loop.index0 }}{{ m.role }}{% endfor %}",
    "loop variables": "{% for m in messages %}{{ loop.first }}{{ loop.length }}{{ loop.revindex }}"
    "{{ loop.previtem.role if loop.previtem is defined }}"
    "{{ loop.nextitem.role if not loop.last }}{% endfor %}",
    "for if else": "{% for m in messages if m.role == 'tool' %}x{% else %}none{% endfor %}",
    "recursive": "{% for m in [[1, [2]], [3]] recursive %}{% if m is iterable %}"
    "<{{ loop(m) }}>{% else %}{{ m }}{% endif %}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages[1] | tojson(indent=2) "
    "}}{{ {'b': 1, 'a': 'é<'} | tojson(sort_keys=true) }}",
    "tojson separators": "{{ [1, {'a': none}] | tojson(separators=(',', ':'), ensure_ascii=true) }}",
    "specials": "{{ bos_token }}{{ eos_token }}[{{ pad_token }}]"
    "{{ missing }}{{ tools is none }}{{ documents is none }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0, text='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.text = ns.text ~ m.role[0] %}{% endfor %}{{ ns.n }}{{ ns.text }}",
    "macro": "{% macro turn(m, end='<|im_end|>') %}{{ m.role }}"
    ": {{ m.content | trim }}{{ end }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{{ turn(m, end='') }}{% endfor %}",
    "set block": "{% set x %}{{ messages[0].content }}!{% endset %}{{ x | trim }}{{ x | length }}",
    "filters": "{{ messages | map(attribute='role') | join('-') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ 'a-b' | replace('-', '+') }}{{ ['b', 'a'] | sort | first }}"
    "{{ 'x' | upper }}{{ [3, 1] | max }}{{ none | default('d', true) }}",
    "filter block": "{% filter upper %}{{ messages[1].content }}x{% endfilter %}",
    "strings": "{{ messages[2].content.split('</think>')[-1]"
    ".lstrip('\n') }}{{ 'ab'[::-1] }}{{ '%s-%d' % ('a', 3) }}"
    "{{ '{}{:>5}'.format('x', 'y') }}{{ 'a' * 3 }}{{ messages[0]"
    "['content'][:4] + '...' }}{{ '-'.join(['a', 'b']) }}",
    "join an iterator": "{{ ', '.join(messages | map(attribute='role')) "
    "}}{{ messages | map(attribute='content') | join }}",
    "tests": "{{ messages is iterable }}{{ messages[0] is mapping }}"
    "{{ 'x' is string }}{{ 1 is number }}{{ x is defined }}",
    "numbers": "{{ 7 // 2 }}{{ 7 % 3 }}{{ 2 ** 10 }}{{ 1 / 4 }}"
    "{{ -3 * 2 }}{{ 1.5 + 2 }}{{ [1, 2] + [3] }}{{ [0] * 3 }}",
    "dict": "{{ dict(a=1, b='é') }}{% for k, v in dict(a=1).items() "
    "%}{{ k }}={{ v }}{% endfor %}{{ {'x': 1} | items | list }}",
    "slices": "{% for m in messages[1:] %}{{ m.role }}{% endfor %}"
    "{{ messages[-1].content }}{{ messages | length }}",
    "indent": "{{ 'a\nb' | indent(4) }}{{ 'a\nb' | indent(2, true) }}{{ 'x' | center(5) }}",
    "conditions": "{{ 'yes' if messages[0].role == 'system' else 'no' }}"
    "{{ 'in' if 'Hi' in messages[1].content }}",
    "time": "{{ strftime_now('%Y') }}",
    "generation prompt": "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "literal text": "<|im_start|>{{ messages[0].role }}\n<|im_end|>",
    "escapes": "{{ '<&>' | string }}{{ \"it's\" }}{{ '\\u00e9\\n' }}",
}


@pytest.mark.parametrize("name", DIALECT)
def test_renders_as_transformers_does(byte_level: Tokenizer, name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = DIALECT[name]
    rendered, _ = render_jinja_template(
        [CHAT], chat_template=template, add_generation_prompt=True, **byte_level.named_tokens
    )
    chat = ChatTemplate(template, byte_level)
    budgeted = chat._rendered(CHAT, True)  # without the handling of system messages
    assert budgeted == rendered[0]


# --- hostile templates ------------------------------------------------------------------------------------

CANARY = "octavo-canary"

INJECTIONS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ messages|attr('__class__') }}",
    "{{ (messages|attr('__cl' ~ 'ass__')) }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ self.__init__.__globals__.__builtins__ }}",
    "{{ self._TemplateReference__context.eval_ctx.environment }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__ }}",
    "{{ range.__self__ }}",
    "{{ dict.__init__.__globals__ }}",
    "{{ dict.fromkeys.__globals__ }}",
    "{{ ''.format.__self__.__class__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "{% set f = ''.format %}{{ f.__self__ }}{{ '{0.__class__}'|attr('format')(1) }}",
    "{{ ['{0.__class__}'.format]|map('call', 1)|list }}",
    "{% for f in ['{0.__class__}'.format] %}{{ f(1) }}{% endfor %}",
    "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{{ messages.clear() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
    "{% extends 'base' %}",
    "{{ get_flashed_messages.__globals__ }}{{ config }}{{ request.application.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "{{ (1).__class__.__base__ }}{{ none.__class__ }}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}{{ m._environment }}{{ m._func.__globals__ }}",
    "{% for m in messages %}{{ loop._iterable.__class__ }}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{{ environment }}{{ environment.own }}{{ __import__('os') }}{{ eval('1') }}{{ open('CANARY', 'w') }}",
    "{{ messages[0].content.__add__ }}{{ messages[0]"
    ".role.spans.__class__ }}{{ ''|tojson|attr('__class__') }}",
]


@pytest.mark.parametrize("template", INJECTIONS)
def test_templates_reach_nothing(
    byte_level: Tokenizer, template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commands: list[Any] = []
    monkeypatch.setattr(os, "system", commands.append)
    monkeypatch.setattr(os, "popen", commands.append)
    chat: list[Message] = [{"role": "user", "content": "x"}]
    text = ""
    with contextlib.suppress(ChatTemplateError):
        text = ChatTemplate(template.replace("CANARY", CANARY), byte_level).render(chat).text
    assert (commands, list(tmp_path.iterdir())) == ([], [])
    assert chat == [{"role": "user", "content": "x"}]
    for leak in ("<class", "<module", "<function", "object at", "root:", "__builtins__"):
        assert leak not in text


@pytest.mark.parametrize("payload", INJECTIONS)
def test_messages_are_never_templates(byte_level: Tokenizer, payload: str) -> None:
    text = (
        ChatTemplate("{{ messages[0].content }}", byte_level)
        .render([{"role": "user", "content": payload}])
        .text
    )
    assert text == payload


DOUBLE = (
    "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"
)
BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested loops with text": "{% for a in range(99999) %}"
    "{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "a loop that is filtered": "{% for a in range(99999) if range(99999) | list | length < 0 %}{% endfor %}",
    "work in a loop": "{% for a in range(99999) %}{% set x = range(99999) | list | sort %}{% endfor %}",
    "repeated text": "{{ 'a' * 2000000000 }}",
    "repeated text, turned round": "{{ 2000000000 * 'a' }}",
    "repeated list": "{{ [0] * 2000000000 }}",
    "percent width": "{{ '%2000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (2000000000, 1) }}",
    "format width": "{{ '{:>2000000000}'.format(1) }}",
    "nested format width": "{{ '{:>{}}'.format(1, 2000000000) }}",
    "format filter": "{{ '%2000000000d' | format(1) }}",
    "doubling with plus": DOUBLE.replace("START", "'aaaa'").replace("STEP", "ns.x + ns.x"),
    "doubling with tilde": DOUBLE.replace("START", "'aaaa'").replace("STEP", "ns.x ~ ns.x"),
    "doubling a list": DOUBLE.replace("START", "[1]").replace("STEP", "ns.x + ns.x"),
    "nesting a list": DOUBLE.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]"),
    "nesting for tojson": DOUBLE.replace("START", "[1]")
    .replace("STEP", "[ns.x, ns.x]")
    .replace("ns.x }}", "ns.x | tojson }}"),
    "squaring": DOUBLE.replace("START", "3").replace("STEP", "ns.x * ns.x"),
    "power": "{{ 9 ** 9999999 }}",
    "replacing": DOUBLE.replace("START", "'a' * 100000").replace("STEP", "ns.x.replace('a', 'a' * 100000)"),
    "replacing by filter": DOUBLE.replace("START", "'a' * 100000").replace(
        "STEP", "ns.x | replace('a', 'a' * 100000)"
    ),
    "center": "{{ 'a' | center(2000000000) }}",
    "ljust": "{{ 'a'.ljust(2000000000) }}",
    "zfill": "{{ 'a'.zfill(2000000000) }}",
    "indent": "{{ 'a\nb' | indent(2000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(tabsize=2000000000) }}",
    "tojson indent": "{{ [1] | tojson(indent=2000000000) }}",
    "translate": "{{ 'aaaa'.translate({97: 'b' * 1000000}) }}",
    "join": "{{ (['a' * 100000] * 100000) | join }}",
    "join by method": "{{ ''.join(['a' * 100000] * 100000) }}",
    "join with a long separator": "{{ ('b' * 100000).join('a' * 100000) }}",
    "sum of lists": "{{ ([[1] * 1000] * 1000) | sum(start=[]) | length }}",
    "kept texts": "{% set ns = namespace(x={}) %}{% for i in range(99999) %}"
    "{% set ns.x = dict(ns.x, **{i | string: 'a' * 100000}) %}{% endfor %}",
    "endless macro": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "exponential macro": "{% macro f(n) %}{% if n > 1 %}{{ f(n - 1) "
    "}}{{ f(n - 2) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless recursive loop": "{% for i in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "deep parentheses": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "deep blocks": "{% if 1 %}" * 5_000 + "{% endif %}" * 5_000,
    "long source": "a" * (MAX_TEMPLATE_CHARACTERS + 1),
    "batch": "{{ [1] | batch(2000000000, 'x') | list }}",
    "slice": "{{ [1] | slice(2000000000) | list }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_defused(byte_level: Tokenizer, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.text.template_limits.MAX_SECONDS", 0.5)
    started = time.process_time()
    with pytest.raises(ChatTemplateError):
        ChatTemplate(BOMBS[name], byte_level).render([{"role": "user", "content": "x"}])
    assert time.process_time() - started < 5  # the limit, and the step that exceeds it


def test_a_long_chat_is_no_bomb(byte_level: Tokenizer, chatml: str) -> None:
    chat: list[Message] = [{"role": "user", "content": "some words " * 100}] * 1_000
    assert len(ChatTemplate(chatml, byte_level).render(chat).text) > 1_100_000


@pytest.mark.parametrize(
    "template", ["{% for %}", "{{ x", "{% unknown %}", "{{ 1 + }}", "{{ messages | nofilter }}"]
)
def test_templates_that_do_not_compile(byte_level: Tokenizer, template: str) -> None:
    with pytest.raises(ChatTemplateError, match="cannot be used"):
        ChatTemplate(template, byte_level)


@pytest.mark.parametrize(
    "template", ["{{ messages[9].content }}", "{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{{ nothing() }}"]
)
def test_templates_that_fail(byte_level: Tokenizer, template: str) -> None:
    with pytest.raises(ChatTemplateError, match="cannot be used"):
        ChatTemplate(template, byte_level).render([{"role": "user", "content": "x"}])


def test_what_a_template_raises_is_shown(byte_level: Tokenizer) -> None:
    with pytest.raises(InvalidInputError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}", byte_level).render(
            [{"role": "user", "content": "x"}]
        )
