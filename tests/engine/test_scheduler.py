"""The scheduler without an engine: admission, order, budget, preemption, and a sequence's states."""

from __future__ import annotations

import pytest

from octavo.engine.prefix import root_key
from octavo.engine.scheduler import Scheduler
from octavo.engine.sequence import Sequence
from octavo.engine.waiting import MAX_OVERTAKEN, WaitingQueue
from octavo.types import FinishReason


@pytest.fixture
def scheduler(toy):
    def build(windows=(None,), pages=(16,), slots=4, chunk=32, mixed=None):
        return Scheduler(toy.spec(windows).kv_groups, pages, slots, chunk, mixed)

    return build


@pytest.fixture
def sequence(toy):
    numbers = iter(range(1000))

    def make(reuse=True, **kwargs):
        root = root_key("weights", None, kwargs.get("salt", "")) if reuse else b""
        return Sequence(next(numbers), toy.request(**kwargs), root_key=root)

    return make


def read(planner, entries):
    """What the engine does with a step's results, with tokens that are all 7."""
    for sequence, chunk in entries:
        sequence.computed_tokens += chunk.tokens
        planner.paging.free_leaving_pages(sequence)
        if chunk.sample:
            sequence.token_ids.append(7)
            planner.publish(sequence)
    planner.check()


def step(planner):
    """Admit, plan and read back -> [(sequence, tokens)]."""
    planner.admit()
    entries = planner.plan()
    planner.take_preempted_slots()
    read(planner, entries)
    return [(sequence, chunk.tokens) for sequence, chunk in entries]


def end(planner, sequence):
    sequence.finish_reason = FinishReason.CANCELLED
    planner.release(sequence)
    planner.check()


def test_states(scheduler, sequence):
    one = sequence(prompt=40, new=3)
    planner = scheduler()
    states = [one.state]
    planner.add(one)
    planner.admit()
    for _ in range(2):
        states.append(one.state)
        read(planner, planner.plan())
    states.append(one.state)
    one.finish_reason = FinishReason.LENGTH
    states.append(one.state)
    assert [state.value for state in states] == ["waiting", "prefilling", "prefilling", "running", "finished"]
    planner.release(one)
    planner.check()
    assert planner.paging.pool.used == (0,)


def test_admission_asks_for_the_tokens_there_are(scheduler, sequence):
    """16 pages. Lives of 8, 7 and 7 pages, but 3, 1 and 6 to begin with: all are admitted; a fourth of 6 is not."""
    planner = scheduler(slots=8)
    lives = [sequence(prompt=p, new=n) for p, n in [(90, 166), (1, 223), (190, 34), (161, 2)]]
    for one in lives:
        planner.add(one)
    assert planner.admit() == lives[:3]
    assert planner.paging.pool.used == (0,), "pages are taken as they are needed"
    assert (planner.waiting, planner.active) == (1, 3)
    lives[2].finish_reason = FinishReason.CANCELLED
    planner.release(lives[2])
    assert planner.admit() == lives[3:]


def test_who_is_admitted_keeps_a_page_for_each_that_runs(scheduler, sequence):
    planner = scheduler(pages=(6,), chunk=96)
    for tokens in (64, 96):
        planner.add(sequence(prompt=tokens, new=9))
    assert len(planner.admit()) == 2
    step(planner)
    third = sequence(prompt=2, new=1)
    planner.add(third)
    assert planner.admit() == [], "1 page is free and two sequences will want one"


def test_slots_bound_admission(scheduler, sequence):
    planner = scheduler(slots=2)
    for _ in range(3):
        planner.add(sequence(prompt=3, new=3))
    assert [one.slot for one in planner.admit()] == [0, 1]
    assert planner.admit() == []


def test_the_budget_of_a_step(scheduler, sequence):
    """Decodes always; of a prompt 32 tokens, 6 while somebody decodes; those behind a long one get a share."""
    planner = scheduler(slots=9, chunk=32, mixed=6)
    running, long, short = sequence(prompt=5, new=9), sequence(prompt=36, new=1), sequence(prompt=9, new=1)
    planner.add(running)
    assert step(planner) == [(running, 5)]
    planner.add(long)
    planner.add(short)
    assert [step(planner) for _ in range(3)] == [
        [(running, 1), (long, 6), (short, 6)],
        [(running, 1), (long, 6), (short, 3)],
        [(running, 1), (long, 6)],
    ]
    end(planner, running)
    other = sequence(prompt=70, new=1)
    planner.add(other)
    assert step(planner) == [(long, 18), (other, 14)], "nobody decodes: the whole budget"
    assert step(planner) == [(other, 32)]


def test_the_budget_of_many_prompts(scheduler, sequence):
    """Beside a decode 4 prompts' worth; without one, a long prompt leaves half of the rest to those behind."""
    planner = scheduler(slots=9, chunk=32, mixed=6, pages=(64,))
    running, *others = sequence(prompt=5, new=9), *(sequence(prompt=100, new=1, seed=i) for i in range(6))
    planner.add(running)
    step(planner)
    for one in others:
        planner.add(one)
    assert [tokens for _, tokens in step(planner)] == [1, 6, 6, 6, 3, 2, 1]
    end(planner, running)
    assert [tokens for _, tokens in step(planner)] == [16, 8, 4, 2, 1, 1]


def test_a_window_waits_rather_than_exceed_its_pages(scheduler, sequence):
    """4 pages. Queries from 128 on see 1 page of the past and need 2 of their own, but the chunk in flight still
    reads 2 more: once it is read back, they fit."""
    planner = scheduler((33,), pages=(4,), chunk=64)
    one = sequence(prompt=300, new=5, reuse=False)
    planner.add(one)
    planner.admit()
    first, second = planner.plan(), planner.plan(may_preempt=False)
    assert planner.paging.pool.used == (4,)
    read(planner, first)
    assert planner.paging.pool.used == (3,)
    assert planner.plan(may_preempt=False) == []
    assert planner.wants_drain
    read(planner, second)
    ((_, third),) = planner.plan()
    assert not planner.wants_drain
    assert (third.start, third.page_tables[0][:3]) == (128, (-1, -1, -1))
    assert planner.paging.pool.used == (3,)
    planner.check()


def test_passed_pages_leave_the_table_and_then_the_pool(scheduler, sequence):
    planner = scheduler((40,), pages=(4,), chunk=32)
    one = sequence(prompt=96, new=5, reuse=False)
    planner.add(one)
    planner.admit()
    for _ in range(3):
        read(planner, planner.plan())
    in_flight = planner.plan()
    ((_, chunk),) = in_flight
    assert chunk.start == 96
    assert chunk.page_tables[0][0] == -1, "the query at 96 sees keys from 57"
    assert -1 not in chunk.page_tables[0][1:]
    assert planner.paging.pool.used == (3,)
    read(planner, in_flight)


# --- preemption ----------------------------------------------------------------------------------------


def test_the_lowest_priority_gives_way_then_the_newest(scheduler, sequence):
    """4 sequences of 1 page each have no others; the first goes on, then the second, and each wants more."""
    planner = scheduler(pages=(8,), slots=4, chunk=128)
    first, second, low, newest = (
        sequence(prompt=31, new=90, priority=p, seed=s) for s, p in enumerate([1, 1, 0, 1])
    )
    for one in (first, second, low, newest):
        planner.add(one)
    step(planner)
    assert planner.active == 4
    planner.paging.pool.take(0, 4)  # somebody else's
    order = []
    for _ in range(70):
        planner.plan()
        planner.take_preempted_slots()
        for one in (first, second, low, newest):
            one.computed_tokens = one.queued_tokens
            if one.slot is None and one not in order:
                order.append(one)
    assert order[:2] == [low, newest]
    assert first.slot is not None
    assert planner.preemptions == len(order)


def test_who_ranks_lowest_waits_for_pages_rather_than_give_its_own_up(scheduler, sequence):
    planner = scheduler(pages=(4,), slots=2, chunk=128)
    first, second = sequence(prompt=40, new=9), sequence(prompt=32, new=9)
    for one in (first, second):
        planner.add(one)
    assert step(planner) == [(first, 40), (second, 32)]
    (page,) = planner.paging.pool.take(0, 1)  # the last one, for a while
    assert [one for one, _ in planner.plan()] == [first]
    assert planner.preemptions == 0
    planner.paging.pool.give_back(0, [page])
    first.computed_tokens += 1
    assert [one for one, _ in planner.plan()] == [first, second]


def test_a_preempted_sequence_feeds_all_it_has_and_samples_on(scheduler, sequence):
    planner = scheduler(pages=(4,), slots=2, chunk=128)
    first, second = sequence(prompt=30, new=90), sequence(prompt=31, new=60, reuse=False)
    for one in (first, second):
        planner.add(one)
    while not planner.preemptions:
        step(planner)
    assert second.slot is None
    assert (second.queued_tokens, second.computed_tokens, second.page_tables) == (0, 0, ())
    has = len(second.token_ids)
    assert has > 31
    end(planner, first)
    planner.admit()
    ((_, chunk),) = planner.plan()
    assert (chunk.start, len(chunk.token_ids), chunk.sample) == (0, has, True)
    assert chunk.token_ids == tuple(second.token_ids)


# --- the order of admission ----------------------------------------------------------------------------


def queue_of(sequence, priorities):
    queue, made = WaitingQueue(), [sequence(prompt=3, new=1, priority=p) for p in priorities]
    for one in made:
        queue.add(one)
    return queue, made


def take(queue):
    sequence = queue.first()
    queue.take(sequence)
    return sequence


def test_priority_then_arrival(sequence):
    queue, made = queue_of(sequence, [0, 5, 0, -1, 5])
    assert [take(queue) for _ in made] == [made[i] for i in (1, 4, 0, 2, 3)]


def test_nobody_starves(sequence):
    """One at a low priority, and no end of others at a high one."""
    queue, (low,) = queue_of(sequence, [-3])
    admitted = []
    while low not in admitted:
        queue.add(sequence(prompt=3, new=1, priority=9))
        admitted.append(take(queue))
    assert len(admitted) == MAX_OVERTAKEN + 1
    assert low.rank < (-9, 0), "and it is not preempted for them"
    queue.add(sequence(prompt=3, new=1, priority=9))
    assert low.rank < take(queue).rank


def test_one_priority_is_never_reordered(sequence):
    queue, made = queue_of(sequence, [2] * 50)
    assert [take(queue) for _ in made] == made
    assert all(one.rank[0] == -2 for one in made)


def test_removing_from_the_queue(sequence):
    queue, made = queue_of(sequence, [0, 1, 0])
    queue.remove(made[0])
    assert [take(queue) for _ in range(len(queue))] == [made[1], made[2]]


def test_dropping_a_waiting_sequence(scheduler, sequence):
    planner = scheduler(slots=1)
    first, second = sequence(prompt=3, new=3), sequence(prompt=3, new=3)
    planner.add(first)
    planner.add(second)
    planner.admit()
    planner.drop(second)
    assert planner.waiting == 0


def test_check_notices_pages_nobody_holds(scheduler, sequence):
    planner = scheduler()
    planner.paging.pool.take(0, 1)
    with pytest.raises(AssertionError, match="sequences hold 0 pages, not 1"):
        planner.check()


def test_targets_are_the_following_tokens(sequence, scheduler):
    planner = scheduler(chunk=4)
    one = sequence(prompt=[1, 2, 3, 4, 5, 6], new=1, score=2)
    planner.add(one)
    planner.admit()
    chunks = [planner.plan()[0][1] for _ in range(2)]
    assert [chunk.targets for chunk in chunks] == [(2, 3, 4, 5), (6, -1)]
    assert [chunk.top_logprobs for chunk in chunks] == [2, 2]
