"""What strangers write runs in children: templates and grammars meant to do harm cost their own request (24, 25).

The templates here get past the limits that are counted step by step (`octavo.text.template_limits`): one step of the
interpreter is enough. `test_streams.py` has those that do not.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from time import sleep
from urllib.parse import quote

import psutil
import pytest

from octavo.errors import ChatTemplateError, ClosedError, InvalidGrammarError, InvalidInputError
from octavo.server import wire
from octavo.server.child_renderer import ChildRenderer
from octavo.server.confined import ConfinedFrontend
from octavo.server.grammar_checker import GrammarChecker
from octavo.server.warm_children import ChildLostError, NoChildError, WarmChildren
from octavo.text.template_rendering import LocalRenderer, Rendering
from octavo.types import Grammar

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
FOR_EVER = {
    "equality": "{% set a = namespace(x=[1]) %}{% set b = namespace(x=[1]) %}{% for i in range(40) %}"
    "{% set a.x = [a.x, a.x] %}{% set b.x = [b.x, b.x] %}{% endfor %}{{ a.x == b.x }}",
    "sort": "{{ (range(99999) | list * 9) | sort | length }}",
}
MEMORY = (
    "{% set n = namespace(x=[]) %}{% for i in range(99999) %}"
    "{% set n.x = n.x + [range(99999) | list] %}{% endfor %}"
)


def user(content: str) -> Rendering:
    return Rendering(({"role": "user", "content": content},), named_tokens={"eos_token": "<|im_end|>"})


@pytest.fixture
def renderer():
    made = []

    def make(source, **more):
        made.append(ChildRenderer(source, **more))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("link", ["inherited", "loopback"])
def test_a_child_renders_what_this_process_would(renderer, link):
    asked = Rendering(
        (
            {"role": "user", "content": 'é世"\\\n<|im_end|>'},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
                ],
            },
        ),
        tools=({"type": "function", "function": {"name": "f", "parameters": {"maximum": 10**40}}},),
        options={"enable_thinking": True},
        named_tokens={"eos_token": "<|im_end|>"},
    )
    source = CHATML + "{{ tools | tojson }}{{ eos_token }}{{ enable_thinking }}{{ messages[1].tool_calls }}"
    here, there = LocalRenderer(source).render(asked), renderer(source, link=link).render(asked)
    assert (str(there), there.spans) == (str(here), here.spans)


@pytest.mark.parametrize("name", FOR_EVER)
def test_a_template_that_never_ends_is_killed_and_the_next_is_rendered(renderer, name):
    source = "{% if messages[0].content == 'bomb' %}" + FOR_EVER[name] + "{% endif %}" + CHATML
    there = renderer(source)
    first = set(there.children._alive)
    with pytest.raises(ChatTemplateError, match="more time"):
        there.render(user("bomb"))
    assert str(there.render(user("x"))) == "<|im_start|>user\nx<|im_end|>\n"
    assert there.children.killed == 1
    assert not first & there.children._alive
    assert not any(child.is_alive() for child in first)


@pytest.mark.skipif(sys.platform != "linux", reason="address space is capped by Linux alone")
def test_a_template_that_takes_all_memory_is_stopped(renderer):
    source = "{% if messages[0].content == 'bomb' %}" + MEMORY + "{% endif %}" + CHATML
    there = renderer(source)
    with pytest.raises(ChatTemplateError):
        there.render(user("bomb"))
    (child, *_) = there.children._alive
    assert psutil.Process(child._child.pid).memory_info().vms < 256 << 20
    assert str(there.render(user("x"))).startswith("<|im_start|>user")


def test_errors_are_those_of_this_process(renderer):
    refusing = renderer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidInputError, match="roles must alternate"):
        refusing.render(user("x"))
    with pytest.raises(ChatTemplateError, match="TemplateSyntaxError"):
        renderer("{% for %}")


def test_after_close_there_is_no_child_and_no_answer(renderer):
    there = renderer(CHATML)
    (child,) = there.children._alive
    there.close()
    with pytest.raises(ClosedError):
        there.render(user("x"))
    assert not child.is_alive()


SCRIPTED = """
import os, signal, sys, time
from octavo.server import wire
from octavo.server.child import QuestionCaps, serve

def answer(question):
    exec(question.asked)
    return wire.Rendered(str(os.getpid()), ())

serve(sys.argv[1], QuestionCaps(64 << 20, 0.4), lambda first: answer)
"""


@pytest.fixture
def scripted(tmp_path):
    (tmp_path / "child.py").write_text(SCRIPTED)
    children = WarmChildren((str(tmp_path / "child.py"),), wire.Template(""), seconds=3, most=3)
    yield children
    children.close()


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("sum(range(10**12))", "more time"),  # within one instruction
        ("import time; time.sleep(60)", "more time"),  # without computing
        ("os.kill(os.getpid(), 9)", "ends the process"),
        ("os._exit(0)", "ends the process"),
        ("1 / 0", "ends the process"),
    ],
)
def test_whatever_a_child_does_its_question_alone_fails(scripted, code, why):
    with pytest.raises(ChildLostError, match=why):
        scripted.ask(wire.Render(code))
    assert isinstance(scripted.ask(wire.Render("pass")), wire.Rendered)


@pytest.mark.skipif(sys.platform != "linux", reason="address space is capped by Linux alone")
def test_memory_for_one_question_is_capped(scripted):
    assert isinstance(scripted.ask(wire.Render("bytearray(32 << 20)")), wire.Rendered)
    assert isinstance(scripted.ask(wire.Render("bytearray(100 << 20)")), wire.Refused)
    assert scripted.killed == 0


def test_children_are_kept_warm_and_are_few(scripted):
    assert len({scripted.ask(wire.Render("pass")).text for _ in range(20)}) == 1
    with ThreadPoolExecutor(12) as threads:
        slow = wire.Render("import time; time.sleep(0.05)")
        pids = {one.text for one in threads.map(lambda _: scripted.ask(slow), range(24))}
    assert 1 < len(pids) <= 3


def test_those_that_are_not_needed_any_more_go(scripted, monkeypatch):
    with ThreadPoolExecutor(6) as threads:
        slow = wire.Render("import time; time.sleep(0.2)")
        list(threads.map(lambda _: scripted.ask(slow), range(6)))
    before = set(scripted._alive)
    assert len(before) > 1
    scripted.trim()
    assert scripted._alive == before
    monkeypatch.setattr("octavo.server.warm_children._IDLE_SECONDS", 0.0)
    scripted.trim()
    (left,) = scripted._alive
    assert [child.is_alive() for child in before if child is not left] == [False] * (len(before) - 1)


def test_one_that_was_killed_while_idle_is_replaced(scripted):
    scripted.ask(wire.Render("pass"))
    (child,) = scripted._alive
    child._child.kill()
    child._child.process.wait(5)
    assert isinstance(scripted.ask(wire.Render("pass")), wire.Rendered)
    assert scripted.killed == 0


def test_no_child_in_time_says_nothing_of_the_question(scripted):
    with ThreadPoolExecutor(3) as threads:
        for _ in range(3):
            threads.submit(scripted.ask, wire.Render("import time; time.sleep(2)"))
        while len(scripted._alive) < 3 or scripted._idle or scripted._starting:
            sleep(0.01)
        scripted._seconds = 0.1
        with pytest.raises(NoChildError, match="too many others"):
            scripted.ask(wire.Render("pass"))
        scripted._seconds = 3


def test_a_child_that_is_being_set_up_ends_with_the_rest(tmp_path):
    (tmp_path / "child.py").write_text(
        SCRIPTED.replace("lambda first: answer", "lambda first: time.sleep(60)")
    )
    children = WarmChildren((str(tmp_path / "child.py"),), wire.Template(""), seconds=3, most=3)
    with ThreadPoolExecutor(1) as threads:
        warming = threads.submit(children.warm)
        while not children._setting_up:
            sleep(0.01)
        children.close()
        with pytest.raises(ClosedError):
            warming.result(5)


@pytest.mark.parametrize("link", ["auto", "loopback"])
def test_a_bomb_holds_up_no_other_request(serving, served, health_probe, link):
    """Figure 24: 400, nothing over 256 MB, and the loop answers all the while; the model is served on."""
    source = "{% if messages[-1].content == 'bomb' %}" + FOR_EVER["equality"] + "{% endif %}" + CHATML
    model = served(model=f"fake?template={quote(source)}")
    with serving(model, worker_link=link) as harness:
        harness.wait_ready()
        worker = harness.service.models.resident("fake").link.pid
        with health_probe(harness) as lags, ThreadPoolExecutor(6) as threads:
            bombs = [threads.submit(harness.chat, "bomb") for _ in range(3)]
            others = [threads.submit(harness.chat, f"hello {n}!stop") for n in range(3)]
            for number, future in enumerate(others):
                found = future.result().json()["choices"][0]["message"]["content"]
                assert found == f"hello {number}!stop"
            for future in bombs:
                response = future.result()
                assert (response.status_code, response.json()["error"]["code"]) == (400, "template_error")
        assert lags[len(lags) * 9 // 10] < 1.0  # on a machine that runs other tests beside
        resident = harness.service.models.resident("fake")
        assert resident.link.pid == worker
        assert harness.service.models.restarts == 0


def test_an_idle_model_is_tended(serving, monkeypatch):
    tended = Event()
    monkeypatch.setattr("octavo.server.models._TEND_SECONDS", 0.05)
    monkeypatch.setattr(ConfinedFrontend, "tend", lambda self, idle: idle and tended.set())
    with serving() as harness:
        harness.wait_ready()
        assert tended.wait(10)


@pytest.mark.model
def test_a_grammar_is_compiled_in_a_child_first(default_tokenizer_source):
    source, vocab_size, ends = default_tokenizer_source
    checker = GrammarChecker(source, vocab_size=vocab_size, end_token_ids=ends)
    try:
        good = Grammar("regex", "[a-z]{3}")
        checker.warm()
        (child,) = checker.children._alive
        checker.check(good)
        assert checker.children._alive == {child}
        with pytest.raises(InvalidGrammarError):
            checker.check(Grammar("regex", "(unclosed"))
        assert child.is_alive()
        child._child.kill()  # a grammar that is known needs no child
        checker.check(good)
        child._child.process.wait(5)
        checker.check(Grammar("regex", "[a-z]{4}"))
    finally:
        checker.close()


@pytest.mark.model
@pytest.mark.parametrize(
    "count", [200, pytest.param(20_000, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
)
def test_many_grammars_fill_no_memory(default_tokenizer_source, count):
    """Figure 26: each schema is new; neither side keeps them all."""
    source, vocab_size, ends = default_tokenizer_source
    checker = GrammarChecker(source, vocab_size=vocab_size, end_token_ids=ends)
    own = psutil.Process()
    held = []
    try:
        for number in range(count):
            schema = f'{{"type": "object", "properties": {{"p{number}": {{"type": "string"}}}}}}'
            checker.check(Grammar("json_schema", schema))
            if number in (count // 4, count - 1):
                (child,) = checker.children._alive
                held.append(own.memory_info().rss + psutil.Process(child._child.pid).memory_info().rss)
        assert checker.children.killed == 0
    finally:
        checker.close()
    assert held[1] - held[0] < 64 << 20
