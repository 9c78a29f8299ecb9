"""The engine's promises on a toy model: order, batching, chunks, windows, ends, run-ahead, scoring."""

from __future__ import annotations

import dataclasses
import threading

import pytest

from octavo.errors import ClosedError, ContextLengthError, EmptyPromptError
from octavo.types import FinishReason

MODES = ("sync", "lazy", "random", "thread")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("windows", [(None,), (40,), (None, 40), (None, 5, 64)], ids=str)
def test_tokens_are_the_models(toy, mode, windows):
    harness = toy.harness(mode, windows)
    requests = [toy.request(prompt=p, new=n, seed=p) for p, n in [(1, 70), (33, 40), (150, 3), (64, 100)]]
    assert harness.run(*requests) == [toy.expected(harness, request) for request in requests]


@pytest.mark.parametrize("prompt", [1, 31, 32, 33, 63, 64, 65, 47, 48, 49, 95, 96, 97])
@pytest.mark.parametrize("mode", ["sync", "lazy"])
def test_chunk_borders(toy, prompt, mode):
    """Prompts around a page (32) and a chunk (48) and two of them."""
    harness = toy.harness(mode, (None, 40), chunk=48)
    request = toy.request(prompt=prompt, new=40)
    assert harness.run(request) == [toy.expected(harness, request)]
    chunks = [chunk.tokens for batch in harness.runner.forwarded for chunk in batch.chunks if chunk.token_ids]
    assert sum(chunks) == prompt
    assert all(tokens == 48 for tokens in chunks[:-1])


@pytest.mark.parametrize("chunk", [1, 2, 7, 32, 200])
def test_any_chunk_size_gives_the_same_tokens(toy, chunk):
    harness = toy.harness("lazy", (None, 40), chunk=chunk)
    request = toy.request(prompt=100, new=20, repetition_penalty=1.3, presence_penalty=0.5)
    assert harness.run(request) == [toy.expected(harness, request)]


@pytest.mark.parametrize("mode", ["sync", "lazy"])
def test_alone_equals_together(toy, mode):
    requests = [toy.request(prompt=3 + 17 * i, new=20 + 9 * i, seed=i, logprobs=2) for i in range(8)]
    together = toy.harness(mode, slots=8)
    together.run(*requests)
    for request_id, request in enumerate(requests):
        alone = toy.harness(mode, slots=1)
        alone.run(request)
        same_but_id = [dataclasses.replace(event, request_id=request_id) for event in alone.events[0]]
        assert together.events[request_id] == same_but_id, "tokens, logprobs and ends"
    assert max(len(batch.chunks) for batch in together.runner.forwarded) == 8, "several ran in one batch"


def test_first_come_first_served(toy):
    """A long request at the head is not overtaken by short ones that would fit."""
    harness = toy.harness(pages=(10,), slots=4, context=320, chunk=256)
    running = harness.submit(toy.request(prompt=32 * 5, new=60))
    harness.step()
    long, short = (
        harness.submit(toy.request(prompt=32 * 6, new=2)),
        harness.submit(toy.request(prompt=2, new=2)),
    )
    harness.drain()
    first = [[request for request, _ in harness.order].index(r) for r in (running, long, short)]
    assert first == sorted(first)
    assert (
        harness.order.index((long, harness.tokens(long)[0]))
        > [r for r, _ in harness.order].index(running) + 58
    )


def test_prefill_budget_is_shared_and_decodes_go_on(toy):
    """A long prompt costs running sequences at most a chunk's work a step."""
    harness = toy.harness(chunk=16)
    running = harness.submit(toy.request(prompt=4, new=30))
    harness.step()
    harness.submit(toy.request(prompt=100, new=1))
    harness.submit(toy.request(prompt=20, new=1))
    harness.drain()
    batches = harness.runner.forwarded
    for batch in batches:
        assert sum(chunk.tokens for chunk in batch.chunks if chunk.token_ids) <= 16
    assert len(harness.tokens(running)) == 30
    assert all(any(chunk.token_ids is None for chunk in batch.chunks) for batch in batches[1:9])
    mixed = [[chunk.tokens for chunk in batch.chunks if chunk.token_ids] for batch in batches]
    assert [8, 8] in mixed, "a long prompt leaves half of the budget to the next"
    assert [12, 4] in mixed, "and gets what that leaves"


@pytest.mark.parametrize("mode", ["sync", "lazy"])
def test_windows_hand_pages_back(toy, mode):
    """A window of 40 never holds more pages than it can see, though 500 tokens go by."""
    harness = toy.harness(mode, (40,), pages=(4,), slots=1, chunk=32)
    request = toy.request(prompt=300, new=200)
    assert harness.engine.context_tokens == 512
    used = []
    request_id = harness.submit(request)
    while harness.step() or harness.engine.info()["running"]:
        used.append(harness.engine.info()["pages"]["used"][0])
    assert harness.tokens(request_id) == toy.expected(harness, request)
    assert max(used) <= 4
    assert min(used[20:-2]) <= 3


@pytest.mark.parametrize("mode", ["sync", "lazy"])
@pytest.mark.parametrize(("prompt", "new"), [(500, 12), (511, 1), (1, 511), (512, 0)])
def test_the_context_is_exact(toy, mode, prompt, new):
    harness = toy.harness(mode, slots=1)
    request = toy.request(prompt=prompt, new=new)
    assert harness.run(request) == [toy.expected(harness, request)]
    last = max(chunk.start + chunk.tokens for batch in harness.runner.forwarded for chunk in batch.chunks)
    assert last == prompt + max(new - 1, 0), "the last token is not fed"


def test_what_can_never_fit_is_refused_with_both_numbers(toy):
    harness = toy.harness(slots=1)
    with pytest.raises(ContextLengthError, match=r"505 tokens and 8 new .* 512") as refusal:
        harness.submit(toy.request(prompt=505, new=8))
    assert (refusal.value.prompt_tokens, refusal.value.context_tokens) == (505, 512)
    with pytest.raises(EmptyPromptError):
        harness.submit(toy.request(prompt=()))
    assert harness.step() == []


def test_pages_may_hold_less_than_the_context(toy):
    """Two groups: the smaller one decides; a window group that holds its window never does."""
    assert toy.harness(windows=(None, 40), pages=(5, 4), chunk=32).engine.context_tokens == 160
    assert toy.harness(windows=(None, 40), pages=(5, 3), chunk=32).engine.context_tokens == 96
    assert toy.harness(windows=(40,), pages=(4,), chunk=32).engine.context_tokens == 512
    harness = toy.harness(windows=(None, 40), pages=(5, 4), chunk=32)
    request = toy.request(prompt=100, new=60)
    assert harness.run(request) == [toy.expected(harness, request)]
    with pytest.raises(ContextLengthError):
        harness.submit(toy.request(prompt=100, new=61))


@pytest.mark.parametrize("mode", MODES)
def test_finish_reasons(toy, mode):
    harness = toy.harness(mode)
    free = toy.expected(harness, toy.request(new=20))
    stop = free[9]
    stopping = toy.request(new=20, stop=[stop])
    at_the_limit = toy.request(new=free.index(stop) + 1, stop=[stop])
    ids = [harness.submit(request) for request in (toy.request(new=20), stopping, at_the_limit)]
    harness.drain()
    assert [harness.reason(i) for i in ids] == [FinishReason.LENGTH, FinishReason.STOP, FinishReason.STOP]
    assert harness.tokens(ids[1]) == free[: free.index(stop) + 1], (
        "the stop token is emitted, nothing after it"
    )
    assert harness.events[ids[1]][-1].token_id == stop
    for events in harness.events.values():
        assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)


def test_a_synchronous_runner_is_never_run_ahead_of(toy):
    harness = toy.harness("sync")
    free = toy.expected(harness, toy.request(new=20))
    harness.run(toy.request(new=20, stop=[free[5]]), toy.request(new=9, seed=4))
    fed = sum(chunk.tokens for batch in harness.runner.forwarded for chunk in batch.chunks)
    tokens = len(harness.order)
    assert fed == 3 + 3 + tokens - 2
    assert harness.engine.info()["surplus_tokens"] == 0


def test_run_ahead_queues_the_next_step_before_reading(toy):
    """On a device that is always behind: two steps are queued, one is read, no step goes past the last token."""
    harness = toy.harness("lazy")
    request_id = harness.submit(toy.request(new=5))
    queued = []
    while not harness.events.get(request_id) or harness.reason(request_id) is None:
        harness.step()
        queued.append(len(harness.runner.forwarded))
    assert queued == [2, 3, 4, 5, 5]
    assert harness.engine.info()["surplus_tokens"] == 0


def test_a_surplus_step_is_discarded(toy):
    """After a stop the step in flight holds the slot and pages, and is neither emitted nor counted."""
    harness = toy.harness("lazy", slots=1)
    free = toy.expected(harness, toy.request(new=20))
    cut = free.index(free[5]) + 1
    first = harness.submit(toy.request(new=20, stop=[free[5]]))
    second = harness.submit(toy.request(new=3, seed=9))
    while harness.events.get(first, [None])[-1] is None or harness.reason(first) is None:
        harness.step()
    assert harness.engine.info()["running"] == 1, "the slot is still held"
    assert len(harness.runner.slots) == 1
    harness.drain()
    assert harness.tokens(first) == free[:cut]
    assert harness.tokens(second) == toy.expected(harness, toy.request(new=3, seed=9))
    info = harness.engine.info()
    assert (info["surplus_tokens"], info["generated_tokens"], info["prompt_tokens"]) == (1, cut + 3, 6)


@pytest.mark.parametrize("mode", ["sync", "lazy"])
def test_scoring(toy, mode):
    """Prompt logprobs come on the first event, in chunks or whole, with and without generation."""
    request = toy.request(prompt=70, new=0, score=3)
    whole = toy.harness(mode, chunk=128)
    cut = toy.harness(mode, chunk=16)
    ids = whole.submit(request), cut.submit(request)
    whole.drain(), cut.drain()
    (event,) = whole.events[ids[0]]
    assert cut.events[ids[1]] == [event]
    assert (event.token_id, event.finish_reason) == (None, FinishReason.LENGTH)
    assert [entry.token_id for entry in event.prompt_logprobs] == list(request.prompt_token_ids[1:])
    assert all(len(entry.top) == 3 and entry.top[0][1] >= entry.logprob for entry in event.prompt_logprobs)

    both = cut.submit(toy.request(prompt=70, new=4, score=3))
    cut.drain()
    first, *rest = cut.events[both]
    assert first.prompt_logprobs == event.prompt_logprobs
    assert first.token_id is not None
    assert [event.prompt_logprobs for event in rest] == [None] * 3


def test_scoring_one_token(toy):
    harness = toy.harness()
    request_id = harness.submit(toy.request(prompt=1, new=0, score=0))
    harness.drain()
    assert harness.events[request_id][0].prompt_logprobs == ()


def test_logprobs_come_with_their_token(toy):
    harness = toy.harness("lazy")
    request_id = harness.submit(toy.request(new=6, logprobs=2))
    harness.drain()
    for event in harness.events[request_id]:
        assert event.logprob.token_id == event.token_id
        assert len(event.logprob.top) == 2


# --- cancel, close, threads ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sync", "lazy", "random"])
@pytest.mark.parametrize("steps", range(7))
def test_cancel_at_every_stage(toy, mode, steps):
    """Waiting, prefilling (chunks of 16), running: one last event, neighbours undisturbed."""
    harness = toy.harness(mode, slots=2, chunk=16)
    neighbour = harness.submit(toy.request(prompt=5, new=30))
    victim = harness.submit(toy.request(prompt=40, new=30, seed=2))
    waiting = harness.submit(toy.request(prompt=6, new=3, seed=3))
    for _ in range(steps):
        harness.step()
    harness.engine.cancel(victim)
    harness.engine.cancel(victim)
    harness.engine.cancel(10_000)
    harness.drain()
    assert harness.reason(victim) is FinishReason.CANCELLED
    expected = toy.expected(harness, toy.request(prompt=40, new=30, seed=2))
    assert harness.tokens(victim) == expected[: len(harness.tokens(victim))]
    assert harness.tokens(neighbour) == toy.expected(harness, toy.request(prompt=5, new=30))
    assert harness.tokens(waiting) == toy.expected(harness, toy.request(prompt=6, new=3, seed=3))
    harness.engine.cancel(victim)
    assert harness.step() == []


def test_cancel_while_waiting(toy):
    harness = toy.harness(slots=1)
    first, second = harness.submit(toy.request(new=5)), harness.submit(toy.request(new=5))
    harness.step()
    harness.engine.cancel(second)
    harness.drain()
    assert [event.finish_reason for event in harness.events[second]] == [FinishReason.CANCELLED]
    assert len(harness.tokens(first)) == 5


@pytest.mark.parametrize("mode", MODES)
def test_close_ends_every_request(toy, mode):
    harness = toy.harness(mode, slots=2, whole=False)
    ids = [harness.submit(toy.request(new=50, seed=i)) for i in range(4)]
    for _ in range(3):
        harness.step()
    never_collected = harness.submit(toy.request())
    harness.engine.close()
    harness.engine.close()
    assert harness.runner.closed == 1
    harness.step()
    for request_id in (*ids, never_collected):
        assert harness.reason(request_id) is FinishReason.ERROR
        assert isinstance(harness.events[request_id][-1].error, ClosedError)
    assert harness.step(timeout_seconds=60) == [], "it does not wait"
    assert harness.engine.info()["pages"]["used"] == [0]
    assert harness.runner.violations == []
    assert not harness.runner.queue
    with pytest.raises(ClosedError):
        harness.submit(toy.request())
    assert harness.engine.info()["running"] == 0


def test_close_takes_back_what_a_surplus_step_holds(toy):
    """The request has ended, its last step is in flight, and then the engine is closed."""
    harness = toy.harness("lazy", whole=False)
    stop = toy.expected(harness, toy.request(new=20))[5]
    request_id = harness.submit(toy.request(new=20, stop=[stop]))
    while not harness.events.get(request_id) or harness.reason(request_id) is None:
        harness.step()
    assert harness.engine.info()["running"] == 1
    harness.engine.close()
    assert harness.step() == []
    assert harness.engine.info()["running"] == 0
    harness.engine.check()
    assert not harness.runner.queue


def test_the_first_event_says_how_long_its_request_waited(toy):
    harness = toy.harness(slots=1)
    first, second, third = (harness.submit(toy.request(new=n)) for n in (5, 1, 3))
    while third not in harness.events:
        harness.seconds += 1
        harness.step()
    harness.drain()
    waits = [
        [event.queued_seconds for event in harness.events[request]] for request in (first, second, third)
    ]
    assert waits == [[1, 0, 0, 0, 0], [6], [7, 0, 0]]


def test_cancelling_takes_no_lock(toy):
    """An abandoned stream does so from its destructor, whatever locks the thread it runs in may hold."""
    harness = toy.harness()
    request_id = harness.submit(toy.request())
    with harness.engine._mail, harness.engine._work:
        canceller = threading.Thread(target=harness.engine.cancel, args=(request_id,), daemon=True)
        canceller.start()
        canceller.join(5)
        assert not canceller.is_alive()
    harness.drain()
    assert harness.reason(request_id) is FinishReason.CANCELLED


def test_submit_wakes_a_waiting_step(toy):
    harness = toy.harness()
    threading.Timer(0.05, lambda: harness.submit(toy.request(new=1))).start()
    assert len(harness.step(timeout_seconds=30)) == 1


def test_close_wakes_a_waiting_step(toy):
    harness = toy.harness()
    threading.Timer(0.05, harness.engine.close).start()
    assert harness.step(timeout_seconds=30) == []


def test_submit_and_cancel_from_threads(toy):
    harness = toy.harness("thread", slots=4)
    requests = {}
    guard = threading.Lock()

    def user(number):
        for i in range(12):
            request = toy.request(prompt=1 + (number * 7 + i) % 40, new=1 + i, seed=number * 100 + i)
            request_id = harness.submit(request)
            with guard:
                requests[request_id] = request
            if i % 4 == 3:
                harness.engine.cancel(request_id)

    users = [threading.Thread(target=user, args=(number,)) for number in range(4)]
    for thread in users:
        thread.start()
    while any(thread.is_alive() for thread in users):
        harness.step(0.01)
    harness.drain()
    assert len(requests) == 48
    for request_id, request in requests.items():
        expected = toy.expected(harness, request)
        if harness.reason(request_id) is FinishReason.CANCELLED:
            expected = expected[: len(harness.tokens(request_id))]
        assert harness.tokens(request_id) == expected
