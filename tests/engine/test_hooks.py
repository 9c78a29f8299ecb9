"""Grammars, logits processors and what goes wrong in them, on the toy model."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from octavo.errors import InvalidParameterError
from octavo.types import FinishReason, Grammar

MODES = ("sync", "lazy", "random", "thread")


def words(allowed, vocab):
    mask = np.zeros(-(-vocab // 32), np.uint32)
    for token in allowed:
        mask[token // 32] |= np.uint32(1 << token % 32)
    return mask


class Steps:
    """Token i must be congruent to i modulo `modulus`; `length` tokens in all (None: no end). Every third place is
    free. Compiled from "modulus length"."""

    def __init__(self, modulus, length, vocab):
        self.modulus, self.length, self.vocab, self.tokens = modulus, length, vocab, []

    @property
    def finished(self):
        return len(self.tokens) == self.length

    def mask(self):
        place = len(self.tokens)
        if place % 3 == 2:
            return None
        return words([t for t in range(self.vocab) if t % self.modulus == place % self.modulus], self.vocab)

    def accept(self, token_id):
        place = len(self.tokens)
        assert place % 3 == 2 or token_id % self.modulus == place % self.modulus
        self.tokens.append(token_id)


class Unfinishable(Steps):
    @property
    def finished(self):
        return 1 // (4 - len(self.tokens)) > 9


def compiler(toy):
    def compile_grammar(grammar):
        if grammar.text == "bad":
            raise InvalidParameterError("a bad grammar", remedy="Mend it.", parameter="grammar")
        modulus, length = grammar.text.split()
        return Steps(int(modulus), None if length == "none" else int(length), toy.vocab)

    return compile_grammar


def grammar(text):
    return Grammar("regex", text)


def wait_and_drain(harness):
    """Compiling is on another thread: steps may come to nothing meanwhile."""
    for _ in range(10_000):
        harness.step(0.05)
        info = harness.engine.info()
        if not (info["waiting"] or info["running"]):
            return
    raise AssertionError("the engine does not come to an end")


@pytest.mark.parametrize("mode", MODES)
def test_constrained_tokens_are_the_laws(toy, mode):
    """Beside free ones, which must not notice."""
    harness = toy.harness(mode, (None, 40), compile_grammar=compiler(toy), chunk=32)
    requests = [
        toy.request(prompt=20 + i, new=25, seed=i, grammar=grammar(text) if text else None)
        for i, text in enumerate(["7 none", None, "5 12", None, "3 1"])
    ]
    ids = [harness.submit(request) for request in requests]
    wait_and_drain(harness)
    for request_id, request in zip(ids, requests, strict=True):
        constraint = compiler(toy)(request.grammar) if request.grammar else None
        assert harness.tokens(request_id) == toy.expected(harness, request, constraint=constraint)
    assert [harness.reason(i) for i in ids] == [
        FinishReason.LENGTH,
        FinishReason.LENGTH,
        FinishReason.STOP,
        FinishReason.LENGTH,
        FinishReason.STOP,
    ]
    assert harness.events[ids[2]][-1].token_id is None, "its last token is text"


def test_preemption_does_not_lose_its_place_in_a_grammar(toy):
    harness = toy.harness(pages=(5,), context=128, compile_grammar=compiler(toy))
    requests = [toy.request(prompt=30, new=80, seed=i, grammar=grammar("7 none")) for i in range(3)]
    ids = [harness.submit(request) for request in requests]
    wait_and_drain(harness)
    for request_id, request in zip(ids, requests, strict=True):
        expected = toy.expected(harness, request, constraint=compiler(toy)(request.grammar))
        assert harness.tokens(request_id) == expected
    assert harness.engine.info()["preemptions"] > 0


def test_the_mask_is_made_while_the_device_computes(toy):
    """On a device that is always behind, the next forward pass is queued before the last one's token is read."""
    log = []

    class Runner(toy.Runner):
        def forward(self, batch):
            log.append("forward")
            return super().forward(batch)

        def sample(self, batch, masks=None, logits=None):
            log.append("sample")
            return super().sample(batch, masks, logits)

    def compile_grammar(grammar):
        made = compiler(toy)(grammar)
        mask = made.mask
        made.mask = lambda: log.append("mask") or mask()
        return made

    harness = toy.harness("lazy", runner_class=Runner, compile_grammar=compile_grammar)
    harness.submit(toy.request(new=4, grammar=grammar("5 none")))
    wait_and_drain(harness)
    assert log == ["forward", "mask", "sample"] * 4


@pytest.mark.parametrize("mode", ["sync", "lazy"])
def test_a_grammar_that_does_not_compile(toy, mode):
    harness = toy.harness(mode, compile_grammar=compiler(toy))
    bad = harness.submit(toy.request(grammar=grammar("bad")))
    free = harness.submit(toy.request(seed=2))
    wait_and_drain(harness)
    assert isinstance(harness.events[bad][-1].error, InvalidParameterError)
    assert harness.tokens(free) == toy.expected(harness, toy.request(seed=2))


def test_compiling_delays_nobody_else(toy):
    gate = threading.Event()

    def slow(grammar):
        assert gate.wait(20)
        return compiler(toy)(grammar)

    harness = toy.harness(compile_grammar=slow, slots=1)
    waiting = harness.submit(toy.request(new=5, grammar=grammar("5 none")))
    free = harness.submit(toy.request(new=5))
    while harness.engine.info()["generated_tokens"] < 5:
        harness.step()
    assert len(harness.tokens(free)) == 5
    assert waiting not in harness.events
    assert harness.engine.info()["waiting"] == 1
    threading.Timer(0.05, gate.set).start()
    began = time.monotonic()
    assert harness.step(timeout_seconds=30), "the end of compiling wakes a waiting step"
    assert time.monotonic() - began < 20
    wait_and_drain(harness)
    assert len(harness.tokens(waiting)) == 5


@pytest.mark.parametrize("compiled", [False, True])
def test_cancel_and_close_while_compiling(toy, compiled):
    gate = threading.Event()

    def slow(grammar):
        assert gate.wait(20)
        return compiler(toy)(grammar)

    harness = toy.harness(compile_grammar=slow)
    ids = [harness.submit(toy.request(grammar=grammar("5 none"), seed=i)) for i in range(5)]
    harness.step()
    if compiled:
        gate.set()
        time.sleep(0.05)
    harness.engine.cancel(ids[0])
    harness.step()
    assert harness.reason(ids[0]) is FinishReason.CANCELLED
    harness.engine.close()
    harness.step()
    gate.set()
    for request_id in ids[1:]:
        assert harness.reason(request_id) is FinishReason.ERROR


def test_without_a_compiler_grammars_are_refused(toy):
    with pytest.raises(InvalidParameterError, match="no grammars"):
        toy.harness().submit(toy.request(grammar=grammar("5 none")))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["mask", "accept", "finished", "nothing allowed"])
def test_a_constraint_that_raises_fails_its_request_only(toy, mode, where):
    def compile_grammar(text):
        made = compiler(toy)(text)

        def broken(*_):
            if len(made.tokens) == 4:
                raise RuntimeError("injected")
            return type(made).accept(made, *_) if where == "accept" else type(made).mask(made)

        if where == "finished":
            made.__class__ = type(
                "Broken", (Steps,), {"finished": property(lambda self: 1 // (4 - len(self.tokens)) > 9)}
            )
        elif where == "nothing allowed":
            made.mask = lambda: words([], toy.vocab) if len(made.tokens) == 4 else type(made).mask(made)
        else:
            setattr(made, where, broken)
        return made

    harness = toy.harness(mode, compile_grammar=compile_grammar)
    bad = harness.submit(toy.request(new=20, grammar=grammar("5 none")))
    others = [toy.request(prompt=40, new=30, seed=i) for i in (2, 3)]
    ids = [harness.submit(request) for request in others]
    wait_and_drain(harness)
    assert harness.reason(bad) is FinishReason.ERROR
    assert len(harness.tokens(bad)) == {"accept": 5, "finished": 4}.get(where, 4)
    for request_id, request in zip(ids, others, strict=True):
        assert harness.tokens(request_id) == toy.expected(harness, request)


# --- logits processors ---------------------------------------------------------------------------------


def favour_repeats(token_ids, logits):
    logits = logits.copy()
    logits[token_ids[-1]] += 2
    return logits


def halve(token_ids, logits):
    return logits / np.float32(2)


@pytest.mark.parametrize("mode", MODES)
def test_processed_logits_are_sampled_from(toy, mode):
    """In order, before the law's first step; logprobs stay the model's; neighbours do not notice."""
    harness = toy.harness(mode, (None, 40))
    requests = [
        toy.request(prompt=33, new=20, seed=1, logits_processors=(favour_repeats, halve), logprobs=1),
        toy.request(prompt=33, new=20, seed=2),
        toy.request(prompt=9, new=20, seed=3, logits_processors=(halve,), repetition_penalty=1.3),
    ]
    ids = [harness.submit(request) for request in requests]
    harness.drain()
    for request_id, request in zip(ids, requests, strict=True):
        assert harness.tokens(request_id) == toy.expected(harness, request)
    unprocessed = toy.request(prompt=33, new=20, seed=1)
    assert harness.tokens(ids[0]) != toy.expected(harness, unprocessed)
    first = harness.events[ids[0]][0].logprob
    plain = harness.submit(toy.request(prompt=requests[0].prompt_token_ids, new=1, seed=7, logprobs=61))
    harness.drain()
    assert (first.token_id, first.logprob) in harness.events[plain][0].logprob.top


@pytest.mark.parametrize("mode", ["sync", "lazy", "random"])
@pytest.mark.parametrize("fault", ["raises", "exits", "shape", "nan"])
def test_a_processor_that_goes_wrong_fails_its_request_only(toy, mode, fault):
    def process(token_ids, logits):
        if len(token_ids) < 10:
            return logits
        if fault == "raises":
            raise KeyError("injected")
        if fault == "exits":  # not even this ends the engine's thread
            raise SystemExit(3)
        return logits[:-1] if fault == "shape" else logits * np.float32(np.nan)

    harness = toy.harness(mode)
    bad = harness.submit(toy.request(prompt=5, new=20, logits_processors=(process,)))
    other = toy.request(prompt=40, new=30, seed=2)
    good = harness.submit(other)
    harness.drain()
    assert harness.reason(bad) is FinishReason.ERROR
    assert harness.tokens(bad) == toy.expected(harness, toy.request(prompt=5, new=20))[:5]
    assert harness.tokens(good) == toy.expected(harness, other)


def test_grammar_and_processor_together(toy):
    harness = toy.harness(compile_grammar=compiler(toy))
    request = toy.request(new=20, grammar=grammar("4 none"), logits_processors=(favour_repeats,))
    request_id = harness.submit(request)
    wait_and_drain(harness)
    expected = toy.expected(harness, request, constraint=compiler(toy)(request.grammar))
    assert harness.tokens(request_id) == expected


@pytest.mark.parametrize("mode", ["sync", "lazy"])
def test_a_batch_that_raises_beside_hooks(toy, mode):
    """Masks and processed logits are made again for the batch that is run again."""
    harness = toy.harness(mode, compile_grammar=compiler(toy))
    requests = [
        toy.request(prompt=5, new=20, seed=0, grammar=grammar("5 none")),
        toy.request(prompt=5, new=20, seed=1, logits_processors=(favour_repeats,)),
        toy.request(prompt=5, new=20, seed=2),
    ]
    harness.runner.once = True
    harness.runner.faults = {
        (seed, 5 + 3 * seed + at): MemoryError("injected") for seed in (0, 1, 2) for at in (0, 9)
    }
    ids = [harness.submit(request) for request in requests]
    wait_and_drain(harness)
    for request_id, request in zip(ids, requests, strict=True):
        constraint = compiler(toy)(request.grammar) if request.grammar else None
        assert harness.tokens(request_id) == toy.expected(harness, request, constraint=constraint)
