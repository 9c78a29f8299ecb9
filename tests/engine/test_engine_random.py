"""Random arrivals, lengths, stops, cancels and faults: every token as alone, the pool whole after every step.

2,000 requests in all. The negative controls break the engine or the runner and must be caught.
"""

from __future__ import annotations

import random

import pytest

from octavo.engine.loop import StepLoop
from octavo.engine.page_pool import PagePool
from octavo.engine.paging import Paging
from octavo.engine.scheduler import Scheduler
from octavo.engine.sequence import Sequence
from octavo.types import FinishReason

SETUPS = [
    ("sync", (None,), 1, 4, 48),
    ("lazy", (None, 40), 2, 5, 64),
    ("random", (None, 5, 64), 3, 6, 20),
    ("random", (40,), 4, 3, 32),
]


def random_request(toy, source, seed):
    vocabulary = range(toy.vocab)
    return toy.request(
        prompt=source.choice([1, 2, 5, 31, 32, 33, source.randrange(1, 120)]),
        new=source.choice([1, 2, source.randrange(1, 20), source.randrange(1, 20)]),
        seed=seed,
        temperature=source.choice([0.0, 0.7, 1.0]),
        stop=source.sample(vocabulary, source.choice([0, 0, 6])),
        score=source.choice([None, None, None, 1]),
        repetition_penalty=source.choice([1.0, 1.0, 1.2]),
    )


def storm(toy, harness, source, count, fault_share=0.02):
    """Submit `count` requests at random times, disturb them, run to the end and check every one."""
    requests, doomed = {}, {}
    while len(requests) < count:
        for _ in range(source.choice([0, 0, 1, 1, 2, 5])):
            seed = len(requests)
            request = random_request(toy, source, seed)
            if source.random() < fault_share:
                at = len(request.prompt_token_ids) + source.randrange(request.max_new_tokens)
                fault = source.choice(["nan", MemoryError("injected")])
                harness.runner.faults[seed, at] = fault
                doomed[seed] = at - len(request.prompt_token_ids)
            requests[harness.submit(request)] = request
        if requests and source.random() < 0.15:
            harness.engine.cancel(source.choice(list(requests)))
        for _ in range(source.randrange(1, 5)):
            harness.step()
    harness.drain()
    for request_id, request in requests.items():
        expected = toy.expected(harness, request)
        tokens, reason = harness.tokens(request_id), harness.reason(request_id)
        fault_at = doomed.get(request_id)
        if reason is FinishReason.CANCELLED:
            expected = expected[: len(tokens)]
        elif fault_at is not None and fault_at < len(expected):
            assert reason is FinishReason.ERROR
            expected = expected[:fault_at]
        else:
            stopped = expected[-1] in request.stop_token_ids
            assert reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
            if request.prompt_logprobs is not None:
                scores = harness.events[request_id][0].prompt_logprobs
                assert [entry.token_id for entry in scores] == list(request.prompt_token_ids[1:])
        assert tokens == expected


@pytest.mark.parametrize(("mode", "windows", "seed", "slots", "chunk"), SETUPS)
def test_storm(toy, mode, windows, seed, slots, chunk):
    pages = tuple(12 if window is None else 9 for window in windows)
    harness = toy.harness(mode, windows, pages=pages, slots=slots, chunk=chunk, context=160, seed=seed)
    storm(toy, harness, random.Random(seed), 500)
    info = harness.engine.info()
    assert info["faults"] > 0
    assert (mode == "sync") == (info["surplus_tokens"] == 0)


# --- negative controls: each must be noticed -----------------------------------------------------------


def caught(toy, **kwargs):
    """Whether a storm on a broken setup fails a check, or breaks the runner's contract."""
    harness = toy.harness(
        "lazy", (None, 40), pages=(12, 9), slots=5, context=160, whole=False, **{"chunk": 64, **kwargs}
    )
    try:
        storm(toy, harness, random.Random(7), 60, fault_share=0.05)
        harness.assert_whole()
    except (AssertionError, KeyError, IndexError, ValueError):
        return True
    return False


def test_the_sound_engine_is_not_caught(toy):
    assert not caught(toy)


def test_a_runner_that_mixes_rows_is_caught(toy):
    class Runner(toy.Runner):
        def _sample(self, batch, *more):
            chunks = [chunk for chunk in batch.chunks if chunk.sample]
            if len(chunks) > 1:
                a, b = self.slots[chunks[0].slot], self.slots[chunks[1].slot]
                a.logits, b.logits = b.logits, a.logits
            return super()._sample(batch, *more)

    assert caught(toy, runner_class=Runner)


def test_a_runner_whose_rows_depend_on_the_batch_is_caught(toy):
    class Runner(toy.Runner):
        def _sample(self, batch, *more):
            for chunk in batch.chunks:
                for row in self.slots[chunk.slot].logits:
                    row[len(batch.chunks)] += 3
            return super()._sample(batch, *more)

    assert caught(toy, runner_class=Runner)


def test_giving_back_while_a_step_is_in_flight_is_caught(toy, monkeypatch):
    def release(scheduler, sequence):
        sequence.queued_tokens = sequence.computed_tokens
        return sound(scheduler, sequence)

    sound = Scheduler.release
    monkeypatch.setattr(Sequence, "in_flight", property(lambda sequence: False))
    monkeypatch.setattr(Scheduler, "release", release)
    assert caught(toy)


def test_handing_window_pages_back_too_early_is_caught(toy, monkeypatch):
    sound = Paging._pass_window_pages

    def early(paging, sequence):
        sound(paging, sequence)
        paging.free_leaving_pages(sequence)

    monkeypatch.setattr(Paging, "_pass_window_pages", early)
    assert caught(toy, reuse_prefixes=False)  # pages that may be found again are given to others last


def test_a_window_one_page_too_short_is_caught(toy, monkeypatch):
    sound = Paging._pass_window_pages

    def short(paging, sequence):
        groups = paging._window_groups
        paging._window_groups = tuple((group, window - 32) for group, window in groups)
        sound(paging, sequence)
        paging._window_groups = groups

    monkeypatch.setattr(Paging, "_pass_window_pages", short)
    assert caught(toy)


def test_a_page_in_two_tables_is_caught(toy, monkeypatch):
    sound = PagePool.take

    def shared(pool, group, count):
        pages = sound(pool, group, count)
        used = [page for page, holders in enumerate(pool._holders[group]) if holders]
        return (used[0], *pages[1:]) if len(used) > 8 else pages

    monkeypatch.setattr(PagePool, "take", shared)
    assert caught(toy)


def test_a_retry_without_rebuilt_slots_is_caught(toy, monkeypatch):
    monkeypatch.setattr(StepLoop, "_rebuild_slot", lambda loop, sequence: None)
    assert caught(toy)
