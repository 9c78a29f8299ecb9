"""Prefix reuse: what is found, what never is, who waits for whom, and that no token shows it."""

from __future__ import annotations

import itertools

import pytest

from octavo.engine.engine import Engine
from octavo.engine.paging import Paging
from octavo.errors import InvalidParameterError, NumericalError
from octavo.runners.base import Adapter

MODES = ("sync", "lazy", "random")
SYSTEM = list(range(1, 61)) * 3
"""180 tokens: 5 pages and 20 tokens."""


def first_event(harness, request_id):
    return harness.events[request_id][0]


def run_one(toy, harness, **kwargs):
    """-> how many prompt tokens were found; the tokens must be the model's."""
    request = toy.request(**kwargs)
    request_id = harness.submit(request)
    harness.drain()
    assert harness.tokens(request_id) == toy.expected(harness, request)
    return first_event(harness, request_id).cached_tokens


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("windows", [(None,), (None, 40), (40,), (None, 5, 64)], ids=str)
def test_a_second_request_computes_only_what_is_new(toy, mode, windows):
    harness = toy.harness(mode, windows)
    assert run_one(toy, harness, prompt=[*SYSTEM, 5, 6], new=9) == 0
    computed = sum(chunk.tokens for batch in harness.runner.forwarded for chunk in batch.chunks)
    assert run_one(toy, harness, prompt=[*SYSTEM, 7], new=9, seed=2) == 160
    more = sum(chunk.tokens for batch in harness.runner.forwarded for chunk in batch.chunks) - computed
    assert more == 181 - 160 + 8
    info = harness.engine.info()
    assert (info["prefix_queried_tokens"], info["prefix_hit_tokens"]) == (182 + 181, 160)
    assert info["pages"]["cached"][0] >= 5
    assert [sum(info["pages"][state][0] for state in ("free", "used", "cached"))] == info["pages"]["total"][
        :1
    ]


@pytest.mark.parametrize("tokens", [31, 32, 33, 63, 64, 65, 96, 97])
def test_one_token_at_least_is_computed(toy, tokens):
    harness = toy.harness()
    prompt = SYSTEM[:tokens]
    assert run_one(toy, harness, prompt=prompt, new=3) == 0
    assert run_one(toy, harness, prompt=prompt, new=3, seed=2) == (tokens - 1) // 32 * 32


@pytest.mark.parametrize("mode", MODES)
def test_a_chat_goes_on_from_its_own_answer(toy, mode):
    """Generated tokens are found too; the last one was never fed."""
    harness = toy.harness(mode)
    request = toy.request(prompt=SYSTEM[:50], new=80)
    (answer,) = harness.run(request)
    follow_up = [*SYSTEM[:50], *answer, 3, 4, 5]
    assert run_one(toy, harness, prompt=follow_up, new=5) == 128
    exact = toy.request(prompt=SYSTEM[:48], new=81, seed=4)
    (answer,) = harness.run(exact)
    assert run_one(toy, harness, prompt=[*SYSTEM[:48], *answer, 1], new=1) == 128, (
        "128 tokens were fed, 1 not"
    )


def test_switched_off(toy):
    harness = toy.harness(reuse_prefixes=False)
    assert run_one(toy, harness, prompt=SYSTEM, new=3) == 0
    assert run_one(toy, harness, prompt=SYSTEM, new=3, seed=2) == 0
    info = harness.engine.info()
    assert info["prefix_reuse"] is False
    assert info["pages"]["cached"] == [0]
    assert info["prefix_queried_tokens"] == 0


def test_prompt_logprobs_take_nothing_and_give(toy):
    harness = toy.harness()
    whole = toy.request(prompt=SYSTEM, new=2, score=1)
    ids = [harness.submit(whole)]
    harness.drain()
    ids.append(harness.submit(whole))
    harness.drain()
    first, second = (first_event(harness, i) for i in ids)
    assert first.prompt_logprobs == second.prompt_logprobs
    assert len(first.prompt_logprobs) == len(SYSTEM) - 1
    assert second.cached_tokens == 0
    assert run_one(toy, harness, prompt=SYSTEM, new=2) == 160


# --- what must not be shared ---------------------------------------------------------------------------


def adapter(digest):
    return Adapter(digest, {})


def test_salts_adapters_and_weights_are_apart(toy):
    """Every combination finds what itself left, and nothing else; with an adapter the values differ, so sharing
    would show in the tokens too."""
    harness = toy.harness(slots=2, context=512, pages=(200,))
    harness.engine.load_adapter("a", adapter("digest of a"))
    harness.engine.load_adapter("b", adapter("digest of b"))
    digests = {None: None, "a": "digest of a", "b": "digest of b"}
    cases = list(itertools.product(["", "alice", "digest of a"], digests))
    for again in (0, 160):
        for salt, name in cases:
            request = toy.request(prompt=SYSTEM, new=3, salt=salt, adapter=name)
            request_id = harness.submit(request)
            harness.drain()
            assert first_event(harness, request_id).cached_tokens == again, (salt, name)
            assert harness.tokens(request_id) == toy.expected(harness, request, adapter=digests[name])
    other = Engine(harness.runner, harness.config, harness.spec, "other digest")
    ours, theirs = harness.engine, other
    keys = []
    for engine in (ours, theirs):
        engine.submit(toy.request(prompt=SYSTEM))
        keys.append(engine._submitted[0].keys)
    assert not set(keys[0]) & set(keys[1]), "another format of the same weights has other keys"
    harness.drain()


def test_the_comparison_can_fail(toy, monkeypatch):
    """Were adapters left out of the key, tokens would be wrong."""
    import octavo.engine.engine as module

    sound = module.root_key
    monkeypatch.setattr(module, "root_key", lambda weights, adapter, salt: sound(weights, None, salt))
    harness = toy.harness()
    harness.engine.load_adapter("a", adapter("digest of a"))
    harness.run(toy.request(prompt=SYSTEM, new=3))
    request = toy.request(prompt=SYSTEM, new=9, adapter="a")
    assert harness.run(request) != [toy.expected(harness, request, adapter="digest of a")]


def test_an_adapter_loaded_anew_under_its_name_shares_nothing(toy):
    harness = toy.harness()
    for digest in ("one", "two", "one"):
        harness.engine.load_adapter("a", adapter(digest))
        request = toy.request(prompt=SYSTEM, new=3, adapter="a")
        request_id = harness.submit(request)
        harness.drain()
        assert harness.tokens(request_id) == toy.expected(harness, request, adapter=digest)
        harness.engine.drop_adapter("a")
    assert first_event(harness, request_id).cached_tokens == 160, "its content is what it was"


def test_adapters_come_and_go(toy):
    harness = toy.harness("lazy")
    with pytest.raises(InvalidParameterError, match="no adapter 'a'; loaded: none"):
        harness.submit(toy.request(adapter="a"))
    harness.engine.load_adapter("a", adapter("one"))
    with pytest.raises(InvalidParameterError, match="is an adapter 'a' already"):
        harness.engine.load_adapter("a", adapter("one"))
    harness.submit(toy.request(adapter="a", new=4))
    for _ in range(2):
        with pytest.raises(InvalidParameterError, match="uses the adapter 'a'"):
            harness.engine.drop_adapter("a")
        harness.step()
    harness.drain()
    harness.engine.drop_adapter("a")
    with pytest.raises(InvalidParameterError, match="no adapter 'a'"):
        harness.engine.drop_adapter("a")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("windows", [(None,), (None, 40), (40,)], ids=str)
@pytest.mark.parametrize("at", [1, 33, 150, 180, 181, 200])
def test_what_is_not_finite_is_never_found(toy, mode, windows, at):
    """A row that went wrong once, in the prompt or later, leaves poison in its page and all later ones."""
    harness = toy.harness(mode, windows, chunk=48, pages=(60,) * len(windows))
    harness.runner.poisonous = True
    harness.runner.faults = {(9, at): "nan kv"}
    victim = toy.request(prompt=SYSTEM, new=60, seed=9)
    request_id = harness.submit(victim)
    harness.drain()
    assert isinstance(harness.events[request_id][-1].error, NumericalError)
    good = max(at - 1, 180) if at > 180 else 0
    assert harness.tokens(request_id) == toy.expected(harness, victim)[: max(at - 180, 0)]
    harness.runner.faults.clear()
    found = run_one(toy, harness, prompt=[*SYSTEM, *harness.tokens(request_id)[:-1], 1], new=20, seed=3)
    assert found <= good
    assert not (at <= 180 and found)


def test_publishing_before_a_token_proves_it_would_be_caught(toy, monkeypatch):
    sound = Paging.extend

    def hasty(paging, sequence, tokens):
        if sequence.page_tables and not sequence.in_flight:
            paging.publish(sequence)
        return sound(paging, sequence, tokens)

    monkeypatch.setattr(Paging, "extend", hasty)
    harness = toy.harness(chunk=48)
    harness.runner.poisonous = True
    harness.runner.faults = {(9, 33): "nan kv"}
    harness.run(toy.request(prompt=SYSTEM, new=60, seed=9))
    harness.runner.faults.clear()
    with pytest.raises(AssertionError):
        run_one(toy, harness, prompt=SYSTEM, new=20, seed=3)


def test_a_step_that_raised_leaves_nothing_to_find(toy):
    harness = toy.harness(chunk=48)
    harness.runner.faults = {(9, 144): MemoryError("injected")}
    request_id = harness.submit(toy.request(prompt=SYSTEM, new=3, seed=9))
    harness.drain()
    assert isinstance(harness.events[request_id][-1].error, MemoryError)
    assert run_one(toy, harness, prompt=SYSTEM, new=3) == 0


# --- waiting for who computes it already ---------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("windows", [(None,), (None, 40)], ids=str)
def test_n_choices_share_their_prefill(toy, mode, windows):
    harness = toy.harness(mode, windows, slots=8, chunk=64)
    requests = [toy.request(prompt=SYSTEM, new=10, choice=choice) for choice in range(8)]
    assert harness.run(*requests) == [toy.expected(harness, request) for request in requests]
    fed = sum(c.tokens for batch in harness.runner.forwarded for c in batch.chunks if c.token_ids is not None)
    assert fed == 180 + 7 * 20
    assert len({tuple(harness.tokens(i)) for i in range(8)}) == 8
    assert [first_event(harness, i).cached_tokens for i in range(8)] == [0] + [160] * 7


def test_shared_pages_count_once(toy):
    """8 choices of 6 pages each in a pool of 20: 5 shared, one of each one's own, and one to grow into."""
    harness = toy.harness(slots=8, pages=(20,), context=256, chunk=64)
    requests = [toy.request(prompt=SYSTEM, new=5, choice=choice) for choice in range(8)]
    assert harness.run(*requests) == [toy.expected(harness, request) for request in requests]
    assert max(len(batch.chunks) for batch in harness.runner.forwarded) == 8
    assert harness.engine.info()["preemptions"] == 0


@pytest.mark.parametrize("end", ["cancelled", "failed", "preempted"])
def test_who_follows_goes_on_when_its_leader_ends(toy, end):
    harness = toy.harness(slots=3, chunk=32)
    leader, follower = toy.request(prompt=SYSTEM, new=5, seed=1), toy.request(prompt=SYSTEM, new=5, seed=2)
    ids = [harness.submit(leader), harness.submit(follower)]
    if end == "failed":
        harness.runner.faults = {(1, 96): RuntimeError("injected")}
    for _ in range(2):
        harness.step()
    assert {chunk.slot for batch in harness.runner.forwarded for chunk in batch.chunks} == {0}
    if end == "cancelled":
        harness.engine.cancel(ids[0])
    if end == "preempted":
        scheduler = harness.engine._scheduler
        scheduler._preempt(scheduler._active[0])
        (slot,) = scheduler.take_preempted_slots()
        harness.runner.close_slot(slot)
    harness.drain()
    assert harness.tokens(ids[1]) == toy.expected(harness, follower)
    if end == "preempted":
        assert harness.tokens(ids[0]) == toy.expected(harness, leader)


def test_who_ranks_first_does_not_wait_for_a_leader_that_gets_no_turn(toy):
    """The leader has a low priority and prompts in between take all of the budget."""
    harness = toy.harness(slots=5, chunk=16, pages=(64,))
    low = harness.submit(toy.request(prompt=SYSTEM, new=2, seed=1, priority=-1))
    harness.step()
    others = [toy.request(prompt=150, new=1, seed=50 + i, priority=5) for i in range(3)]
    first = toy.request(prompt=SYSTEM, new=2, seed=2, priority=9)
    other_ids = [harness.submit(request) for request in others]
    first_id = harness.submit(first)
    harness.drain()
    order = [request for request, _ in harness.order]
    assert order.index(first_id) < order.index(low)
    assert order.index(first_id) < max(order.index(i) for i in other_ids)
    assert harness.tokens(first_id) == toy.expected(harness, first)


# --- windows, eviction ---------------------------------------------------------------------------------


def test_of_a_window_only_the_last_one_must_be_there(toy):
    """A window of 40 passed most of the prompt's pages; they may be found as long as nobody needed the room."""
    harness = toy.harness("sync", (None, 40), pages=(64, 20), chunk=32, slots=2)
    assert run_one(toy, harness, prompt=[*SYSTEM, 1, 2], new=30) == 0
    assert run_one(toy, harness, prompt=[*SYSTEM[:100], 9], new=3) == 96
    small = toy.harness("sync", (None, 40), pages=(64, 6), chunk=32, slots=2)
    assert run_one(toy, small, prompt=[*SYSTEM, 1, 2], new=30) == 0
    assert run_one(toy, small, prompt=[7] * 64, new=1) == 0
    assert run_one(toy, small, prompt=[*SYSTEM[:100], 9], new=3) == 0, "page 1 and 2 of the window are gone"
    assert small.engine.info()["prefix_evicted_pages"] > 0


def test_what_was_used_last_stays(toy):
    """Room for two prefixes of 5 pages: the one used again is kept, the other evicted, end first."""
    harness = toy.harness(pages=(13,), slots=1, context=256)
    a, b, c = (([token] * 160) for token in (1, 2, 3))
    for prompt in (a, b, a):
        run_one(toy, harness, prompt=[*prompt, 9], new=1)
    run_one(toy, harness, prompt=[*c, 9], new=1)
    assert run_one(toy, harness, prompt=[*a, 9], new=1, seed=2) == 160
    assert run_one(toy, harness, prompt=[*b, 9], new=1, seed=2) == 64, "3 of its 5 pages went, from the end"
