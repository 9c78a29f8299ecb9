"""The scheduler without an engine: admission, order, budget, and a sequence's states."""

from __future__ import annotations

import pytest

from octavo.engine.scheduler import Scheduler
from octavo.engine.sequence import Sequence
from octavo.types import FinishReason


@pytest.fixture
def scheduler(toy):
    def build(windows=(None,), pages=(16,), slots=4, chunk=32):
        return Scheduler(toy.spec(windows).kv_groups, pages, slots, chunk)

    return build


@pytest.fixture
def sequence(toy):
    numbers = iter(range(1000))
    return lambda **kwargs: Sequence(next(numbers), toy.request(**kwargs))


def read(entries):
    for sequence, chunk in entries:
        sequence.computed_tokens += chunk.tokens


def test_states(scheduler, sequence):
    one = sequence(prompt=40, new=3)
    planner = scheduler()
    states = [one.state]
    planner.add(one)
    planner.admit()
    for _ in range(2):
        states.append(one.state)
        read(planner.plan())
    states.append(one.state)
    one.finish_reason = FinishReason.LENGTH
    states.append(one.state)
    assert [state.value for state in states] == ["waiting", "prefilling", "prefilling", "running", "finished"]
    planner.release(one)
    planner.check()
    assert planner.pool.used == (0,)


def test_admission_sets_whole_lives_aside(scheduler, sequence):
    """16 pages: lives of 8, 7 and 2 pages; the third waits though its first chunk would fit."""
    planner = scheduler()
    lives = [sequence(prompt=200, new=57), sequence(prompt=1, new=224), sequence(prompt=33, new=2)]
    for one in lives:
        planner.add(one)
    assert planner.admit() == lives[:2]
    assert planner.pool.used == (0,), "set aside, not taken"
    assert (planner.waiting, planner.active) == (1, 2)
    lives[1].finish_reason = FinishReason.CANCELLED
    planner.release(lives[1])
    assert planner.admit() == lives[2:]


def test_slots_bound_admission(scheduler, sequence):
    planner = scheduler(slots=2)
    for _ in range(3):
        planner.add(sequence(prompt=3, new=3))
    assert [one.slot for one in planner.admit()] == [0, 1]
    assert planner.admit() == []


def test_decodes_first_then_prompts_in_order_within_the_budget(scheduler, sequence):
    planner = scheduler(chunk=32)
    running, long, short = sequence(prompt=5, new=9), sequence(prompt=40, new=1), sequence(prompt=10, new=1)
    planner.add(running)
    planner.admit()
    read(planner.plan())
    planner.add(long)
    planner.add(short)
    planner.admit()
    steps = []
    for _ in range(3):
        entries = planner.plan()
        steps.append([(one, chunk.token_ids is None, chunk.tokens, chunk.sample) for one, chunk in entries])
        read(entries)
    assert steps == [
        [(running, True, 1, True), (long, False, 32, False)],
        [(running, True, 1, True), (long, False, 8, True), (short, False, 10, True)],
        [(running, True, 1, True)],
    ]


def test_a_window_waits_rather_than_exceed_its_pages(scheduler, sequence):
    """4 pages are set aside. Queries from 128 on see 1 page of the past and need 2 of their own, but the chunk
    in flight still reads 2 more: once it is read back, they fit."""
    planner = scheduler((33,), pages=(4,), chunk=64)
    one = sequence(prompt=300, new=5)
    planner.add(one)
    planner.admit()
    first, second = planner.plan(), planner.plan()
    assert planner.pool.used == (4,)
    read(first)
    planner.free_leaving_pages(one)
    assert planner.pool.used == (3,)
    assert planner.plan() == []
    read(second)
    ((_, third),) = planner.plan()
    assert (third.start, third.page_tables[0][:3]) == (128, (-1, -1, -1))
    assert planner.pool.used == (3,)
    planner.check()


def test_passed_pages_leave_the_table_and_then_the_pool(scheduler, sequence):
    planner = scheduler((40,), pages=(4,), chunk=32)
    one = sequence(prompt=96, new=5)
    planner.add(one)
    planner.admit()
    for _ in range(3):
        read(planner.plan())
    in_flight = planner.plan()
    ((_, chunk),) = in_flight
    assert chunk.start == 96
    assert chunk.page_tables[0][0] == -1, "the query at 96 sees keys from 57"
    assert -1 not in chunk.page_tables[0][1:]
    assert planner.pool.used == (3,)
    read(in_flight)


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
    planner.pool.allocate(0, 1)
    with pytest.raises(AssertionError, match="1,\\) are used"):
        planner.check()


def test_targets_are_the_following_tokens(sequence, scheduler):
    planner = scheduler(chunk=4)
    one = sequence(prompt=[1, 2, 3, 4, 5, 6], new=1, score=2)
    planner.add(one)
    planner.admit()
    chunks = [planner.plan()[0][1] for _ in range(2)]
    assert [chunk.targets for chunk in chunks] == [(2, 3, 4, 5), (6, -1)]
    assert [chunk.top_logprobs for chunk in chunks] == [2, 2]
