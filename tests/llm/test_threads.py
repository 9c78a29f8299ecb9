"""`LLM` under threads, asyncio and close: nobody waits for ever, and nobody gets another's answer."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from octavo import LLM, SamplingParams, errors

LONG = SamplingParams(max_new_tokens=400, temperature=0)
SOON_SECONDS = 20
"""Far more than it takes, far less than the suite's timeout: a hang is a failure with a name."""


@pytest.fixture
def own(tiny_folder):
    llm = LLM(tiny_folder, device="cpu", cache=False, context=512)
    yield llm
    llm.close()


def idle(llm: LLM) -> bool:
    deadline = time.monotonic() + SOON_SECONDS
    while (engine := llm.info()["engine"])["running"] or engine["waiting"]:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_by_default_several_requests_run_together(own):
    """A short one does not wait for a long one that came before it."""
    long = own.stream([1], LONG)
    next(long)
    short = own.generate([2], SamplingParams(max_new_tokens=4, temperature=0))
    assert len(short.token_ids) == 4
    assert own.info()["engine"]["running"] == 1
    long.close()


def test_two_threads_stream_and_generate_at_once(llm):
    def streamed(seed):
        params = SamplingParams(max_new_tokens=40, seed=seed)
        return [token for event in llm.stream([seed, 1], params) for token in event.token_ids]

    def generated(seed):
        return list(llm.generate([seed, 1], SamplingParams(max_new_tokens=40, seed=seed)).token_ids)

    want = [generated(seed) for seed in range(6)]
    for _ in range(3):
        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(lambda run: [run(seed) for seed in range(6)], (streamed, generated))
        assert first == second == want


def test_asyncio_through_threads(llm):
    params = SamplingParams(max_new_tokens=12, seed=3)

    async def ask():
        return await asyncio.gather(*(asyncio.to_thread(llm.generate, [i, 2], params) for i in range(12)))

    for i, done in enumerate(asyncio.run(ask())):
        assert done.token_ids == llm.generate([i, 2], params).token_ids


def test_a_thousand_prompts_in_one_call(llm):
    prompts = [[i % 128, i // 128] for i in range(1000)]
    params = SamplingParams(max_new_tokens=2, seed=1)
    many = llm.generate(prompts, params)
    assert [done.prompt_token_ids for done in many] == [tuple(prompt) for prompt in prompts]
    for i in (0, 499, 999):
        assert many[i].token_ids == llm.generate(prompts[i], params).token_ids
    assert idle(llm)


@pytest.mark.parametrize("read", [0, 1, 5])
def test_abandoned_iterators_of_several_choices_are_cancelled(own, read):
    stream = own.stream([1], SamplingParams(max_new_tokens=400, n=5, seed=1))
    for _ in range(read):
        next(stream)
    del stream
    gc.collect()
    assert idle(own)
    assert own.generate([1], SamplingParams(max_new_tokens=3)).token_ids


def test_streams_abandoned_in_other_threads_do_not_pile_up(own):
    def abandon(seed):
        next(own.stream([seed], LONG))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(abandon, range(40)))
    gc.collect()
    assert idle(own)


@pytest.mark.parametrize("how", ["generate", "stream", "score"])
def test_close_ends_every_thread_with_a_typed_error(own, how):
    def work():
        while True:  # until it is closed
            if how == "generate":
                own.generate([[1], [2], [3]], LONG)
            elif how == "stream":
                list(own.stream([1], LONG))
            else:
                own.score([1] * 400)

    outcomes: list[BaseException] = []

    def watched():
        try:
            work()
        except BaseException as error:
            outcomes.append(error)

    threads = [threading.Thread(target=watched) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    own.close()
    for thread in threads:
        thread.join(SOON_SECONDS)
        assert not thread.is_alive()
    assert [type(error) for error in outcomes] == [errors.ClosedError] * 4
    assert own.state == "closed"


def test_close_from_two_threads_at_once(own):
    stream = own.stream([1], LONG)
    next(stream)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: own.close(), range(4)))
    assert own.state == "closed"
    with pytest.raises(errors.ClosedError):
        list(stream)


def test_a_bad_prompt_among_many_leaves_nothing_behind(llm):
    with pytest.raises(errors.InvalidInputError):
        llm.generate([[1], [2], [999]], SamplingParams(max_new_tokens=50))
    assert idle(llm)
