"""The native backend is the engine behind the Backend contract."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from octavo.backends.native import NativeBackend
from octavo.errors import ClosedError

PAGE = Path(__file__).parents[2] / "docs" / "engine.md"


def test_the_whole_contract(toy):
    harness = toy.harness(windows=(None, 40))
    backend = NativeBackend(harness.runner, harness.config, harness.spec, "digest")
    assert backend.capabilities.vocab_size == toy.vocab
    assert backend.capabilities.context_tokens == 512
    request = toy.request(new=5)
    kept, cancelled = backend.submit(request), backend.submit(request)
    backend.cancel(cancelled)
    events = []
    while not any(event.request_id == kept and event.finish_reason for event in events):
        events += backend.step(1.0)
    assert [e.token_id for e in events if e.request_id == kept] == toy.expected(harness, request)
    info = json.loads(json.dumps(backend.info()))
    assert (info["runner"], info["device"], info["memory"].keys()) == ("fake", "cpu", {"kv"})
    assert info["card"] is None  # not on a card
    assert info["engine"]["generated_tokens"] == 5
    assert info["compiled"]["recompiles"] == 0
    documented = re.findall(r"^\| (`.*?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    names = {name for cell in documented for name in re.findall(r"`(\w+)`", cell)}
    assert set(info["engine"]) == names
    backend.close()
    with pytest.raises(ClosedError):
        backend.submit(request)
    assert backend.info()["memory"] == {}


def test_hooks_reach_the_engine(toy):
    harness = toy.harness()
    backend = NativeBackend(
        harness.runner,
        harness.config,
        harness.spec,
        "digest",
        reuse_prefixes=False,
        compile_grammar=lambda grammar: pytest.fail("nobody asked"),
        make_drafter=lambda: lambda token_ids: (),
    )
    assert backend.capabilities.grammars
    info = backend.info()["engine"]
    assert (info["prefix_reuse"], info["speculation"]) == (False, True)
    assert not NativeBackend(harness.runner, harness.config, harness.spec, "digest").capabilities.grammars
