"""Guesses are verified, counted and never change a token; text that nothing predicts soon gets none."""

from __future__ import annotations

import dataclasses
import random

import pytest

from octavo.engine.drafting import PromptLookup
from octavo.engine.hooks import Guess
from octavo.engine.scheduler import MAX_DRAFT_ROWS
from octavo.engine.speculation import MAX_DRAFTS, Speculation, cost, may_pay

MODES = ("sync", "lazy", "random", "thread")


class Oracle:
    """Knows what the model will say of some prompts, and is wrong with probability `wrong` at each token."""

    def __init__(self, wrong=0.0, seed=0, chance=0.95):
        self.chance = chance
        self.known, self.wrong, self.random, self.calls = [], wrong, random.Random(seed), 0

    def __call__(self, token_ids):
        self.calls += 1
        for whole in self.known:
            if whole[: len(token_ids)] == token_ids:
                rest = whole[len(token_ids) :]
                said = [t if self.random.random() >= self.wrong else (t + 1) % 61 for t in rest] + [1] * 4
                return [Guess(token, self.chance) for token in said]
        return []


def prepare(toy, oracle, requests, **kwargs):
    harness = toy.harness(make_drafter=lambda: oracle, **kwargs)
    for request in requests:
        oracle.known.append([*request.prompt_token_ids, *toy.expected(harness, request)])
    return harness


@pytest.mark.usefixtures("guess_in_every_step")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrong", [0.0, 0.2, 0.6, 1.0])
def test_tokens_and_logprobs_are_those_without_guesses(toy, mode, wrong):
    requests = [
        toy.request(
            prompt=20 + 15 * i, new=60 + i, seed=i, temperature=i % 2, logprobs=1, repetition_penalty=1.1
        )
        for i in range(4)
    ]
    plain = toy.harness("sync", (None, 40))
    plain.run(*requests)
    guessed = prepare(toy, Oracle(wrong, chance=1.0), requests, mode=mode, windows=(None, 40))
    guessed.run(*requests)
    for request_id in range(4):
        without, with_guesses = (
            [dataclasses.replace(event, queued_seconds=0) for event in harness.events[request_id]]
            for harness in (plain, guessed)
        )
        assert without == with_guesses
    info = guessed.engine.info()
    assert info["generated_tokens"] == plain.engine.info()["generated_tokens"]
    assert 0 <= info["drafts_accepted"] <= info["drafts_proposed"]
    assert info["drafts_proposed"] > 150
    assert (info["drafts_accepted"] == 0) == (wrong == 1.0)
    if wrong == 0:
        assert info["drafts_accepted"] == info["drafts_proposed"]


def test_right_guesses_save_steps(toy):
    requests = [toy.request(prompt=20, new=200)]
    harness = prepare(toy, Oracle(), requests)
    harness.run(*requests)
    steps = harness.engine.info()["steps"]
    assert steps <= 200 / (1 + MAX_DRAFTS) + 5
    last = [chunk for batch in harness.runner.forwarded for chunk in batch.chunks][-1]
    assert last.start + last.tokens <= 20 + 199, "never past the last token"


def test_wrong_guesses_soon_stop(toy):
    requests = [toy.request(prompt=20, new=400)]
    harness = prepare(toy, Oracle(1.0), requests)
    harness.run(*requests)
    info = harness.engine.info()
    assert info["steps"] == 400
    assert info["drafts_proposed"] * cost(1, 1) <= 0.5 + 0.01 * 400


@pytest.mark.parametrize("mode", ["sync", "lazy"])
def test_a_stop_among_accepted_guesses(toy, mode):
    request = toy.request(prompt=20, new=100)
    harness = prepare(toy, Oracle(), [request], mode=mode)
    expected = toy.expected(harness, request)
    stop = next(t for t in expected[20:] if t not in expected[:20])
    stopping = dataclasses.replace(request, stop_token_ids=frozenset([stop]))
    request_id = harness.submit(stopping)
    harness.drain()
    assert harness.tokens(request_id) == expected[: expected.index(stop) + 1]
    assert harness.engine.info()["generated_tokens"] == expected.index(stop) + 1


def test_a_row_that_is_not_finite_among_guesses(toy):
    request = toy.request(prompt=20, new=100, seed=9)
    harness = prepare(toy, Oracle(), [request])
    harness.runner.faults = {(9, 50): "nan"}
    request_id = harness.submit(request)
    harness.drain()
    assert harness.tokens(request_id) == toy.expected(harness, request)[:30]
    assert harness.events[request_id][-1].error is not None
    follow_up = toy.request(prompt=[*request.prompt_token_ids, *harness.tokens(request_id)], new=3)
    again = harness.submit(follow_up)
    harness.drain()
    assert harness.events[again][0].cached_tokens <= 32
    assert harness.tokens(again) == toy.expected(harness, follow_up)


@pytest.mark.parametrize("mode", ["sync", "lazy"])
def test_a_batch_with_guesses_that_raises(toy, mode):
    requests = [toy.request(prompt=20, new=60, seed=i) for i in range(3)]
    harness = prepare(toy, Oracle(0.3), requests, mode=mode)
    harness.runner.once = True
    harness.runner.faults = {(1, 20 + n): MemoryError("injected") for n in range(0, 60, 3)}
    assert harness.run(*requests) == [toy.expected(harness, request) for request in requests]


def test_not_where_the_host_has_a_say(toy):
    oracle = Oracle()
    request = toy.request(prompt=20, new=30, logits_processors=(lambda ids, row: row,))
    harness = prepare(toy, oracle, [request])
    harness.run(request)
    assert oracle.calls == 0


def test_not_on_a_runner_whose_results_depend_on_chunks(toy):
    class Runner(toy.Runner):
        def __init__(self, *args):
            super().__init__(*args)
            self.info = dataclasses.replace(self.info, chunk_invariant=False)

    oracle = Oracle()
    request = toy.request(prompt=20, new=30)
    harness = prepare(toy, oracle, [request], runner_class=Runner)
    harness.run(request)
    assert oracle.calls == 0
    assert harness.engine.info()["speculation"] is False


def test_a_waiting_request_reads_nothing(toy):
    read = []

    def drafter(token_ids):
        read.append(len(token_ids))
        return ()

    harness = toy.harness(make_drafter=lambda: drafter)
    harness.submit(toy.request(prompt=20, new=30))
    assert not read
    harness.drain()
    assert read == list(range(21, 49))


def test_a_drafter_that_raises_costs_its_guesses_only(toy):
    def drafter(token_ids):
        raise RuntimeError("injected")

    harness = toy.harness(make_drafter=lambda: drafter)
    request = toy.request(prompt=20, new=30)
    assert harness.run(request) == [toy.expected(harness, request)]
    assert harness.engine.info()["faults"] == 1


@pytest.mark.usefixtures("guess_in_every_step")
def test_a_step_verifies_only_so_many_guesses(toy):
    requests = [toy.request(prompt=20, new=200, seed=i) for i in range(8)]
    harness = prepare(toy, Oracle(chance=1.0), requests, slots=8)
    harness.run(*requests)
    assert max(sum(c.drafts for c in batch.chunks) for batch in harness.runner.forwarded) == MAX_DRAFT_ROWS


def test_guesses_never_cost_anybody_its_pages(toy):
    requests = [toy.request(prompt=31, new=64, seed=i) for i in range(3)]
    harness = prepare(toy, Oracle(), requests, pages=(9,), context=96)
    assert harness.run(*requests) == [toy.expected(harness, request) for request in requests]
    assert harness.engine.info()["preemptions"] == 0


def certain(token_ids):
    return [Guess(1, 0.95)] * 20


def test_guesses_pay_or_stay_few():
    """Whatever comes true of them, and however sure the drafter is: by what rows cost they never lose more than half
    a step and 1 % of the tokens."""
    for chance in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9):
        for seed in range(20):
            luck, speculation = random.Random(seed), Speculation(certain)
            tokens, steps = 100, 0.0
            while tokens < 500:
                proposed = len(speculation.guesses([0] * tokens, 20, 1))
                accepted = 0
                while accepted < proposed and luck.random() < chance:
                    accepted += 1
                if proposed:
                    speculation.observe(proposed, accepted, 1)
                tokens += accepted + 1
                steps += 1 + cost(proposed, 1)
                assert steps <= 1.01 * (tokens - 100) + 0.5 + 1e-6


@pytest.mark.parametrize(("sequences", "most"), [(1, MAX_DRAFTS), (2, 4)])
def test_how_many_guesses_come_of_right_ones(sequences, most):
    speculation = Speculation(certain)
    found, tokens = [], 100
    while tokens < 300:
        found.append(len(speculation.guesses([0] * tokens, 20, sequences)))
        speculation.observe(found[-1], found[-1], sequences)
        tokens += 1 + found[-1]
    assert most <= found[-1] <= MAX_DRAFTS
    assert [len(speculation.guesses([0] * tokens, limit, sequences)) for limit in (1, 0, -1)] == [1, 0, 0]


def test_the_fourth_step_of_right_guesses_has_as_many_as_pay():
    speculation, found, tokens = Speculation(certain), [], 100
    for _ in range(4):
        found.append(len(speculation.guesses([0] * tokens, 20, 1)))
        speculation.observe(found[-1], found[-1], 1)
        tokens += 1 + found[-1]
    assert found == [1, 3, MAX_DRAFTS, MAX_DRAFTS]


@pytest.mark.parametrize(("chances", "expected"), [((0.3,) * 8, 0), ((0.95, 0.2, 0.95), 1), ((1.0,) * 8, 8)])
def test_unlikely_guesses_are_not_made(chances, expected):
    speculation = Speculation(lambda token_ids: [Guess(1, chance) for chance in chances])
    speculation.observe(0, 4, 1)
    assert len(speculation.guesses([0] * 9, 20, 1)) == expected


def test_where_little_may_be_lost_only_likely_guesses_are_made():
    made = [
        len(Speculation(lambda token_ids, chance=c: [Guess(1, chance)]).guesses([0], 9, 1))
        for c in (0.6, 0.8)
    ]
    assert made == [0, 1]


def test_a_drafter_is_not_asked_where_no_guess_could_pay(toy):
    requests = [toy.request(prompt=20, new=20 + 40 * (i < 4), seed=i) for i in range(32)]
    oracle = Oracle()
    harness = prepare(toy, oracle, requests, slots=32)
    for request in requests:
        harness.submit(request)
    while harness.engine.info()["generated_tokens"] < 32 * 15:
        harness.step()
    assert oracle.calls == 0
    harness.drain()
    assert oracle.calls > 0
    assert harness.engine.info()["drafts_accepted"] > 0, "with four left"


@pytest.mark.parametrize(("sequences", "may"), [(1, True), (8, True), (32, False)])
def test_where_guesses_may_pay(sequences, may):
    assert may_pay(sequences) == may


def test_a_row_costs_more_beside_others():
    assert cost(0, 1) == cost(0, 5) == 0
    assert cost(1, 1) < cost(1, 2) < cost(1, 8) < 1
    alone = [cost(guesses, 1) for guesses in range(MAX_DRAFTS + 1)]
    assert alone == sorted(alone)


def speedup(prompt, answer):
    """By what rows cost: the answer's tokens for the steps they took with prompt lookup."""
    speculation, tokens, steps = Speculation(PromptLookup()), [*prompt, answer[0]], 0.0
    done = 1
    while done < len(answer):
        guesses = speculation.guesses(tokens, len(answer) - done - 1, 1)
        accepted = next((i for i, g in enumerate(guesses) if g != answer[done + i]), len(guesses))
        speculation.observe(len(guesses), accepted, 1)
        steps += 1 + cost(len(guesses), 1)
        tokens += answer[done : done + accepted + 1]
        done += accepted + 1
    return (len(answer) - 1) / steps


def test_lines_of_a_list_come_half_again_as_fast():
    """Eleven tokens a line, two of them a number that no line before had."""
    text = [token for i in range(34) for token in (1, 2, 10 + i // 10, 10 + i % 10, 3, 4, 5, 6, 5, 7, 8)]
    assert speedup(text[: 24 * 11], text[24 * 11 :][:96]) > 1.6


def test_a_copy_comes_twice_as_fast():
    passage = [random.Random(1).randrange(1000) for _ in range(120)]
    assert speedup([*passage, 7, *passage, 7, *passage[:2]], passage[2:98]) > 2


@pytest.mark.parametrize("seed", range(20))
def test_text_that_hardly_repeats_loses_little(seed):
    """Few tokens come often, as in a language, and follow each other at random."""
    source = random.Random(seed)
    text = [int(1 / (source.random() + 1e-4)) for _ in range(296)]
    assert speedup(text[:200], text[200:]) > 0.985
