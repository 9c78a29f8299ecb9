"""Random arrivals, lengths, priorities, shared prefixes, stops, cancels, guesses and faults in pools too small for
all: every token as alone, the pool whole after every step.

500 requests by default, 10,000 as `slow`. The negative controls break the engine or the runner and must be caught.
"""

from __future__ import annotations

import random

import pytest

from octavo.engine.hooks import Guess
from octavo.engine.loop import StepLoop
from octavo.engine.page_pool import PagePool
from octavo.engine.paging import Paging
from octavo.engine.scheduler import Scheduler
from octavo.engine.sequence import Sequence
from octavo.types import FinishReason

SETUPS = [
    ("sync", (None,), 9, 4, 48),
    ("lazy", (None, 40), 2, 5, 64),
    ("random", (None, 5, 64), 3, 6, 20),
    ("random", (40,), 4, 3, 32),
    ("thread", (None, 40), 5, 4, 64),
]

BASES = [[(7 * i * i + base) % 61 for i in range(128)] for base in range(3)]
"""Beginnings that many prompts share."""


class Lookup:
    """Guesses what followed the last four tokens in what the requests will say, and now and then something else."""

    def __init__(self):
        self.following = {}

    def learn(self, tokens, generated):
        for i in range(len(tokens) - generated, len(tokens)):
            self.following[tuple(tokens[i - 4 : i])] = tokens[i : i + 8]

    def __call__(self, token_ids):
        guesses = self.following.get(tuple(token_ids[-4:]), ())
        wrong = sum(token_ids[-3:]) % 11
        said = [*guesses[:wrong], 0, *guesses[wrong + 1 :]] if wrong < len(guesses) else guesses
        return [Guess(token, 1.0) for token in said]


def random_request(toy, source, seed):
    vocabulary = range(toy.vocab)
    length = source.choice([1, 2, 5, 31, 32, 33, 64, 65, 96, source.randrange(1, 120)])
    base = source.choice(BASES)
    own = source.choice([0, 1, 5, length])
    return toy.request(
        prompt=[*base[: max(length - own, 0)], *(source.choice(vocabulary) for _ in range(min(own, length)))],
        new=source.choice([1, source.randrange(1, 20), min(source.randrange(1, 120), 160 - length)]),
        seed=seed,
        temperature=source.choice([0.0, 0.7, 1.0]),
        stop=source.sample(vocabulary, source.choice([0, 0, 6])),
        score=source.choice([None, None, None, None, 1]),
        repetition_penalty=source.choice([1.0, 1.0, 1.2]),
        priority=source.choice([0, 0, 0, 1, -1]),
        salt=source.choice(["", "", "other"]),
        logits_processors=source.choice([(), (), (), (), (lambda ids, row: row[::-1].copy(),)]),
    )


def storm(toy, harness, source, count, fault_share=0.02, drafter=None):
    """Submit `count` requests at random times, disturb them, run to the end and check every one."""
    requests, expectations, doomed = {}, {}, {}
    while len(requests) < count:
        for _ in range(source.choice([0, 0, 1, 1, 2, 5])):
            seed = len(requests)
            request = random_request(toy, source, seed)
            expected = toy.expected(harness, request)
            if drafter is not None and source.random() < 0.7:
                drafter.learn([*request.prompt_token_ids, *expected], len(expected))
            if source.random() < fault_share:
                at = len(request.prompt_token_ids) + source.randrange(request.max_new_tokens)
                fault = source.choice(["nan", MemoryError("injected")])
                harness.runner.faults[seed, at] = fault
                doomed[seed] = fault, at - len(request.prompt_token_ids)
            request_id = harness.submit(request)
            requests[request_id], expectations[request_id] = request, expected
        if requests and source.random() < 0.15:
            harness.engine.cancel(source.choice(list(requests)))
        for _ in range(source.randrange(1, 5)):
            harness.step()
    harness.drain()
    for request_id, request in requests.items():
        expected = expectations[request_id]
        tokens, reason = harness.tokens(request_id), harness.reason(request_id)
        fault, fault_at = doomed.get(request_id, (None, len(expected)))
        if reason is FinishReason.CANCELLED:
            expected = expected[: len(tokens)]
        elif reason is FinishReason.ERROR:
            assert fault is not None
            # A row strikes at its token; a chunk wherever guesses or preemption cut one that ends there.
            expected = expected[: fault_at if fault == "nan" else len(tokens)]
        else:
            assert fault != "nan" or fault_at >= len(expected)
            stopped = expected[-1] in request.stop_token_ids
            assert reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
            if request.prompt_logprobs is not None:
                scores = harness.events[request_id][0].prompt_logprobs
                assert [entry.token_id for entry in scores] == list(request.prompt_token_ids[1:])
        assert tokens == expected


def run_setup(toy, setup, count):
    mode, windows, seed, slots, chunk = setup
    pages = tuple(8 if window is None else 9 for window in windows)
    drafter = Lookup()
    harness = toy.harness(
        mode,
        windows,
        pages=pages,
        slots=slots,
        chunk=chunk,
        context=160,
        seed=seed,
        make_drafter=lambda: drafter,
    )
    storm(toy, harness, random.Random(seed), count, fault_share=0.06, drafter=drafter)
    info = harness.engine.info()
    assert info["faults"] > 0
    assert info["prefix_hit_tokens"] > 0
    assert info["prefix_evicted_pages"] > 0
    assert 0 < info["drafts_accepted"] < info["drafts_proposed"]
    # A window's pages do not grow with a sequence; in a thread it is chance how many sequences meet.
    assert info["preemptions"] > 0 or windows == (40,) or mode == "thread"
    assert mode != "sync" or info["surplus_tokens"] == 0


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: f"{setup[0]}-{setup[1]}")
def test_storm(toy, setup):
    run_setup(toy, setup, 100)


@pytest.mark.slow
@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: f"{setup[0]}-{setup[1]}")
def test_long_storm(toy, setup):
    run_setup(toy, setup, 2000)


# --- negative controls: each must be noticed -----------------------------------------------------------


def caught(toy, count=60, **kwargs):
    """Whether a storm on a broken setup fails a check, or breaks the runner's contract."""
    harness = toy.harness(
        "lazy", (None, 40), pages=(12, 9), slots=5, context=160, whole=False, **{"chunk": 64, **kwargs}
    )
    try:
        storm(toy, harness, random.Random(7), count, fault_share=0.05)
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
    assert caught(toy, 200, reuse_prefixes=False)  # pages that may be found again are given to others last


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
