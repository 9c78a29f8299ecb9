"""A fault in one request ends that request only, whichever way the runner fails.

At the end trials (40; 200 as `slow`) of each of: a row that is not finite, a failing allocator, a runner that raises,
a callback that does; every one among 32 requests, at a random place.
"""

from __future__ import annotations

import dataclasses
import random

import pytest

from octavo.errors import NumericalError
from octavo.types import FinishReason

MODES = ("sync", "lazy", "random")
PROMPTS = (5, 40, 33, 70)
NEW = 20


def submit_all(toy, harness):
    requests = [toy.request(prompt=prompt, new=NEW, seed=i) for i, prompt in enumerate(PROMPTS)]
    return requests, [harness.submit(request) for request in requests]


def assert_only_victim_failed(toy, harness, requests, ids, victim, kind, tokens):
    """`tokens`: how many the victim emitted before its fault."""
    for i, (request, request_id) in enumerate(zip(requests, ids, strict=True)):
        expected = toy.expected(harness, request)
        if i == victim:
            event = harness.events[request_id][-1]
            assert event.finish_reason is FinishReason.ERROR
            assert isinstance(event.error, kind)
            assert harness.tokens(request_id) == expected[:tokens]
        else:
            assert harness.reason(request_id) is FinishReason.LENGTH
            assert harness.tokens(request_id) == expected
    later = toy.request(prompt=50, new=5, seed=77)
    assert harness.run(later) == [toy.expected(harness, later)], "the engine goes on"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("victim", range(4))
@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_a_row_that_is_not_finite(toy, mode, victim, tokens):
    harness = toy.harness(mode, (None, 40))
    requests, ids = submit_all(toy, harness)
    harness.runner.faults = {(victim, PROMPTS[victim] + tokens): "nan"}
    harness.drain()
    assert_only_victim_failed(toy, harness, requests, ids, victim, NumericalError, tokens)


@pytest.mark.parametrize("at_queue", [False, True], ids=["in the handle", "when queued"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("victim", range(4))
@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_a_batch_that_raises(toy, mode, victim, tokens, at_queue):
    """The runner leaves the step's keys, values and slots scribbled over."""
    harness = toy.harness(mode, (None, 40))
    requests, ids = submit_all(toy, harness)
    harness.runner.faults = {(victim, PROMPTS[victim] + tokens): MemoryError("injected")}
    harness.runner.raise_at_queue = at_queue
    harness.drain()
    assert_only_victim_failed(toy, harness, requests, ids, victim, MemoryError, tokens)
    assert harness.engine.info()["faults"] >= 2


@pytest.mark.parametrize("mode", [*MODES, "thread"])
def test_sampling_that_raises(toy, mode):
    harness = toy.harness(mode)
    requests, ids = submit_all(toy, harness)
    harness.runner.raise_in_sample = (1, PROMPTS[1] + 6)
    harness.drain()
    assert_only_victim_failed(toy, harness, requests, ids, 1, RuntimeError, 6)


@pytest.mark.parametrize("mode", [*MODES, "thread"])
def test_a_fault_that_does_not_come_back_fails_nobody(toy, mode):
    harness = toy.harness(mode, (None, 40))
    requests, ids = submit_all(toy, harness)
    harness.runner.once = True
    harness.runner.faults = {(1, PROMPTS[1] + n): MemoryError("injected") for n in (0, 3, 4, 11)}
    harness.drain()
    assert not harness.runner.faults
    for request, request_id in zip(requests, ids, strict=True):
        assert harness.tokens(request_id) == toy.expected(harness, request)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_too_big_for_memory_still_gets_through(toy, mode):
    harness = toy.harness(mode, (None, 40))
    harness.runner.max_chunks = 2
    requests, ids = submit_all(toy, harness)
    harness.drain()
    for request, request_id in zip(requests, ids, strict=True):
        assert harness.tokens(request_id) == toy.expected(harness, request)


@pytest.mark.parametrize("mode", MODES)
def test_a_slot_that_cannot_be_opened(toy, mode):
    harness = toy.harness(mode)
    harness.runner.raise_in_open = 2
    requests, ids = submit_all(toy, harness)
    harness.drain()
    assert_only_victim_failed(toy, harness, requests, ids, 2, MemoryError, 0)


def test_a_slot_that_cannot_be_closed(toy):
    class Runner(toy.Runner):
        def close_slot(self, slot):
            super().close_slot(slot)
            raise RuntimeError("injected in close_slot")

    harness = toy.harness(runner_class=Runner, slots=1)
    requests, ids = submit_all(toy, harness)
    harness.drain()
    assert [harness.tokens(i) for i in ids] == [toy.expected(harness, request) for request in requests]


@pytest.mark.parametrize("mode", MODES)
def test_a_device_that_is_gone_ends_every_request(toy, mode):
    """Everything raises from some step on: each request gets the error, the engine does not."""

    class Runner(toy.Runner):
        def forward(self, batch):
            if len(self.forwarded) > 5:
                raise RuntimeError("device lost")
            return super().forward(batch)

    harness = toy.harness(mode, runner_class=Runner)
    _, ids = submit_all(toy, harness)
    harness.drain()
    assert [str(harness.events[i][-1].error) for i in ids] == ["device lost"] * 4


@pytest.mark.parametrize("mode", ["sync", "lazy", "random"])
@pytest.mark.parametrize("steps", range(1, 6))
def test_a_fault_beside_a_cancel(toy, mode, steps):
    """The neighbour was cancelled while the step that will fail was in flight."""
    harness = toy.harness(mode)
    requests, ids = submit_all(toy, harness)
    harness.runner.faults = {(0, PROMPTS[0] + steps): MemoryError("injected")}
    for _ in range(steps):
        harness.step()
    harness.engine.cancel(ids[1])
    harness.drain()
    assert harness.reason(ids[0]) is FinishReason.ERROR
    assert harness.reason(ids[1]) is FinishReason.CANCELLED
    for i in (2, 3):
        assert harness.tokens(ids[i]) == toy.expected(harness, requests[i])


@pytest.mark.parametrize("mode", MODES)
def test_prompt_logprobs_that_are_not_finite(toy, mode):
    harness = toy.harness(mode, chunk=32)
    victim = harness.submit(toy.request(prompt=70, new=5, seed=1, score=0))
    neighbour = harness.submit(toy.request(prompt=70, new=5, seed=2, score=0))
    harness.runner.faults = dict.fromkeys([(1, end) for end in range(33, 65)], "nan prompt")
    harness.drain()
    assert isinstance(harness.events[victim][-1].error, NumericalError)
    assert harness.events[victim][-1].prompt_logprobs is None
    assert harness.tokens(neighbour) == toy.expected(harness, toy.request(prompt=70, new=5, seed=2))
    assert len(harness.events[neighbour][0].prompt_logprobs) == 69


def test_a_retry_does_not_keep_the_failed_steps_memory(toy):
    """What the failed forward held on its frames is free before its chunks run again."""
    import gc
    import weakref

    class Activations:
        pass

    class Runner(toy.Runner):
        held = None
        alive_at_retry = None

        def forward(self, batch):
            activations = Activations()
            if self.held is None:
                self.held = weakref.ref(activations)
                raise MemoryError("injected")
            if self.alive_at_retry is None:
                self.alive_at_retry = self.held() is not None
            return super().forward(batch)

    gc.disable()
    try:
        harness = toy.harness(runner_class=Runner)
        harness.run(toy.request(new=2))
    finally:
        gc.enable()
    assert harness.runner.alive_at_retry is False


def test_memory_that_is_short_is_not_asked_for_again_at_once(toy):
    """16 sequences where 5 chunks fit: after the first failure steps are small, and grow again now and then."""
    harness = toy.harness(slots=16)
    harness.runner.max_chunks = 5
    requests = [toy.request(prompt=4, new=100, seed=i) for i in range(16)]
    assert harness.run(*requests) == [toy.expected(harness, request) for request in requests]
    failed = sum(len(batch.chunks) > 5 for batch in harness.runner.forwarded)
    assert failed < len(harness.runner.forwarded) / 10


# --- trials --------------------------------------------------------------------------------------------

SEQUENCES = 32


@pytest.fixture(params=[40, pytest.param(200, marks=pytest.mark.slow)])
def count(request):
    return request.param


@pytest.fixture(scope="module")
def crowd():
    """32 prompts, half of which share their first 64 tokens."""
    source = random.Random(0)
    shared = [source.randrange(61) for _ in range(64)]
    return [
        [*(shared if i % 2 else []), *(source.randrange(61) for _ in range(source.randrange(1, 40)))]
        for i in range(SEQUENCES)
    ]


def trials(toy, crowd, count, prepare, new=5):
    """Run the crowd again and again on one engine; `prepare(harness, requests, victim, at, trial)` sets a fault of
    `victim` at position `at` and says how many tokens it gets before, or None where it may not fail."""
    harness = toy.harness("random", (None, 40), slots=SEQUENCES, pages=(200, 200), chunk=256, context=256)
    expected = None
    for trial in range(count):
        source = random.Random(trial)
        requests = [
            toy.request(prompt=prompt, new=new, seed=i, temperature=0.0) for i, prompt in enumerate(crowd)
        ]
        expected = expected or [toy.expected(harness, request) for request in requests]
        victim = source.randrange(SEQUENCES)
        tokens = source.randrange(new)
        at = len(crowd[victim]) + tokens
        requests[victim] = prepare(harness, requests[victim], at, trial) or requests[victim]
        ids = [harness.submit(request) for request in requests]
        harness.drain()
        failed = [i for i in range(SEQUENCES) if harness.reason(ids[i]) is FinishReason.ERROR]
        assert failed in ([], [victim])
        for i, request_id in enumerate(ids):
            got = harness.tokens(request_id)
            assert got == (expected[i] if i not in failed else expected[i][: len(got)]), (trial, i)
        yield harness, harness.events[ids[victim]][-1], len(harness.tokens(ids[victim])), tokens
        harness.runner.faults.clear()
        harness.runner.forwarded.clear()
        harness.events.clear()
        harness.order.clear()


def test_trials_of_rows_that_are_not_finite(toy, crowd, count):
    """In the prompt or later; what it left in the pages is never found by those that come after."""

    def prepare(harness, request, at, trial):
        harness.runner.faults = {(request.sampling.seed, at): "nan"}

    for _, last, got, tokens in trials(toy, crowd, count, prepare):
        assert isinstance(last.error, NumericalError)
        assert got == tokens


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_trials_of_a_runner_that_raises(toy, crowd, count, error):
    """An allocator, or anything else; every other trial only once, which costs nobody anything."""

    def prepare(harness, request, at, trial):
        harness.runner.faults = {(request.sampling.seed, at): error("injected")}
        harness.runner.once = trial % 2 == 0
        harness.runner.raise_at_queue = trial % 4 > 1

    for trial, (harness, last, got, tokens) in enumerate(trials(toy, crowd, count, prepare)):
        assert harness.engine.info()["faults"] > trial
        if trial % 2:
            assert isinstance(last.error, error)
            assert got == tokens
        else:
            # Alone in its batch when it struck, a sequence is taken to be at fault.
            assert last.error is None or got == tokens


def test_trials_of_a_callback_that_raises(toy, crowd, count):
    def prepare(harness, request, at, trial):
        def process(token_ids, logits):
            if len(token_ids) == at:
                raise KeyError("injected")
            return logits

        return dataclasses.replace(request, logits_processors=(process,))

    for _, last, got, tokens in trials(toy, crowd, count, prepare):
        assert isinstance(last.error, KeyError)
        assert got == tokens
