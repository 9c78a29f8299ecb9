"""What the engine may do to a request, it does not show: tokens and logprobs are the same bits alone, in any batch, in
any order, in chunks, preempted, from a cached prefix, with guesses, beside neighbours that are cancelled."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from octavo.engine.engine import Engine
from octavo.engine.hooks import Guess
from octavo.runners.base import Batch
from octavo.types import Request, Sampling, TokenLogprob

NEW_TOKENS = 20
Outcome = list[tuple[int, TokenLogprob]]


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """32, of which most begin with one of two prefixes of 70 tokens."""
    source = random.Random(1)
    prefixes = [[source.randrange(203) for _ in range(70)] for _ in range(2)]
    made = []
    for number in range(32):
        own = [source.randrange(203) for _ in range(source.choice([1, 3, 30, 64, 90]))]
        prefix = prefixes[number % 2] if number % 5 else []
        sampling = Sampling(
            temperature=0.0 if number % 3 == 0 else 0.9,
            seed=number,
            top_p=0.95,
            repetition_penalty=1.0 + 0.1 * (number % 2),
            logprobs=2,
        )
        made.append(Request((*prefix, *own), sampling, NEW_TOKENS))
    return made


class Bench:
    """Engines on native runners of one tiny model, closed when the test ends."""

    def __init__(self, made: Any, isa: Any) -> None:
        self._made, self._isa = made, isa
        self.engine: Engine

    def run(
        self,
        requests: Sequence[Request],
        *,
        cancel: Sequence[int] = (),
        spoil: Callable[[Batch], Batch] | None = None,
        options: dict[str, Any] | None = None,
        **config: Any,
    ) -> list[Outcome]:
        """Submit all at once, cancel some by their place in the list after a few steps -> what each one got."""
        runner = self._made.native(self._isa, **config)
        if spoil is not None:
            forward = runner.forward
            runner.forward = lambda batch: forward(spoil(batch))
        self.engine = Engine(runner, runner._config, self._made.spec, "digest", **(options or {}))
        ids = [self.engine.submit(request) for request in requests]
        found: dict[int, Outcome] = {request_id: [] for request_id in ids}
        ended = steps = 0
        while ended < len(ids):
            if steps == 12:
                for place in cancel:
                    self.engine.cancel(ids[place])
            steps += 1
            for event in self.engine.step(0):
                assert event.error is None
                if event.token_id is not None:
                    found[event.request_id].append((event.token_id, event.logprob))
                ended += event.finish_reason is not None
            self.engine.check()
        self.info = self.engine.info()
        self.engine.close()
        return [found[request_id] for request_id in ids]


@pytest.fixture
def bench(isas: Any, flags: Any, tiny: Callable[..., Any]) -> Bench:
    return Bench(tiny(flags["window"]), isas[-1])


@pytest.fixture
def alone(bench: Bench, requests: list[Request]) -> list[Outcome]:
    """Of each request with the runner to itself, its prompt whole, nothing reused."""
    options = {"reuse_prefixes": False}
    return bench.run(requests, slots=1, options=options)


@pytest.mark.parametrize("slots", [2, 8, 32])
def test_in_a_batch(bench: Bench, requests: list[Request], alone: list[Outcome], slots: int) -> None:
    assert bench.run(requests, slots=slots, options={"reuse_prefixes": False}) == alone
    assert bench.info["prefix_hit_tokens"] == 0


def test_shuffled(bench: Bench, requests: list[Request], alone: list[Outcome]) -> None:
    order = random.Random(2).sample(range(32), 32)
    prioritized = [replace(requests[i], priority=i % 3) for i in order]
    found = bench.run(prioritized, slots=8, threads=2)
    assert found == [alone[i] for i in order]


@pytest.mark.parametrize("chunk", [1, 7, 33])
def test_in_chunks(bench: Bench, requests: list[Request], alone: list[Outcome], chunk: int) -> None:
    found = bench.run(requests[:12], slots=4, chunk=chunk, options={"mixed_prefill_tokens": 5})
    assert found == alone[:12]


def test_preempted(bench: Bench, requests: list[Request], alone: list[Outcome]) -> None:
    longer = [replace(request, max_new_tokens=60) for request in requests]
    whole = bench.run(longer, slots=1, options={"reuse_prefixes": False})
    assert [outcome[:NEW_TOKENS] for outcome in whole] == alone
    for reuse in (False, True):
        found = bench.run(longer, slots=8, pages=24, options={"reuse_prefixes": reuse})
        assert found == whole
        assert bench.info["preemptions"] > 0


def test_from_a_cached_prefix(bench: Bench, requests: list[Request], alone: list[Outcome]) -> None:
    found = bench.run([*requests, *requests], slots=8)
    assert found == [*alone, *alone]
    assert bench.info["prefix_hit_tokens"] > 32 * 32


def test_beside_neighbours_that_are_cancelled(
    bench: Bench, requests: list[Request], alone: list[Outcome]
) -> None:
    found = bench.run(requests, slots=8, cancel=range(0, 32, 3))
    for place in range(32):
        expected = alone[place] if place % 3 else alone[place][: len(found[place])]
        assert found[place] == expected
    assert sum(len(found[place]) < NEW_TOKENS for place in range(0, 32, 3)) > 5


@pytest.mark.parametrize("threads", [1, 3])
def test_with_guesses(
    bench: Bench,
    requests: list[Request],
    alone: list[Outcome],
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Right ones and wrong ones, in every step."""
    for limit in ("_FIRST_CREDIT", "_MOST_CREDIT"):
        monkeypatch.setattr(f"octavo.engine.speculation.{limit}", 1e9)
    following = {}
    for request, outcome in zip(requests, alone, strict=True):
        tokens = [*request.prompt_token_ids, *(token for token, _ in outcome)]
        for end in range(len(tokens) - len(outcome), len(tokens)):
            following[tuple(tokens[end - 3 : end])] = tokens[end : end + 6]

    def guess(token_ids: Sequence[int]) -> Sequence[Guess]:
        guesses = list(following.get(tuple(token_ids[-3:]), ()))
        return [Guess(token if (token + len(token_ids)) % 7 else 0, 1.0) for token in guesses]

    found = bench.run(requests, slots=8, threads=threads, options={"make_drafter": lambda: guess})
    assert found == alone
    assert 50 < bench.info["drafts_accepted"] < bench.info["drafts_proposed"]


# --- each comparison can fail ----------------------------------------------------------------------------


def spoiled(batch: Batch, which: Callable[[Batch, Any], bool]) -> Batch:
    """One prompt token of each chunk that `which` picks is another one."""
    chunks = tuple(
        replace(chunk, token_ids=((chunk.token_ids[0] + 1) % 203, *chunk.token_ids[1:]))
        if chunk.token_ids is not None and which(batch, chunk)
        else chunk
        for chunk in batch.chunks
    )
    return Batch(chunks)


def test_a_runner_that_mixes_a_batch_up_is_noticed(
    bench: Bench, requests: list[Request], alone: list[Outcome]
) -> None:
    def spoil(batch: Batch) -> Batch:
        return spoiled(batch, lambda batch, chunk: len(batch.chunks) > 1)

    assert bench.run(requests[:8], slots=1, spoil=spoil) == alone[:8]
    assert bench.run(requests[:8], slots=2, spoil=spoil) != alone[:8]


def test_a_runner_that_goes_on_wrongly_is_noticed(
    bench: Bench, requests: list[Request], alone: list[Outcome]
) -> None:
    """In chunks, from a cached prefix, after preemption: wherever a prefill does not start at 0."""

    def spoil(batch: Batch) -> Batch:
        return spoiled(batch, lambda batch, chunk: chunk.start > 0)

    whole = {"reuse_prefixes": False}
    assert bench.run(requests[:8], slots=1, spoil=spoil, options=whole) == alone[:8]
    assert bench.run(requests[:8], slots=1, chunk=33, spoil=spoil, options=whole) != alone[:8]
    assert bench.run([*requests[:8]] * 2, slots=1, spoil=spoil) != [*alone[:8]] * 2
