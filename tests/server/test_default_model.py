"""The server in front of the default model: its answers are the model's, alone and in company (figures 31, 37)."""

from __future__ import annotations

import asyncio
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from octavo import LLM, SamplingParams

pytestmark = pytest.mark.model

PROMPTS = [
    "What is the capital of France?",
    "Name three colors.",
    "Write one sentence about the sea.",
    "What is two plus three?",
    "Say hello in German.",
    "Why is the sky blue?",
]


@pytest.fixture(scope="module")
def direct(default_model_path):
    with LLM(default_model_path, context=1024, device="cpu", threads=1, max_sequences=2) as llm:
        yield llm


def body(prompt: str, **more: object) -> dict[str, object]:
    return {"model": "smollm2", "messages": [{"role": "user", "content": prompt}], "max_tokens": 24, **more}


def test_answers_are_those_of_the_engine(default_server, direct):
    """Greedy and seeded, each alone; then all at once, streamed and not: the same tokens."""
    for sampling in ({"temperature": 0.0}, {"temperature": 0.9, "seed": 11}):
        params = SamplingParams(max_new_tokens=24, **sampling)
        expected = [direct.chat([{"role": "user", "content": prompt}], params).text for prompt in PROMPTS]
        alone = [default_server.chat(prompt, max_tokens=24, **sampling).json() for prompt in PROMPTS]
        assert [answer["choices"][0]["message"]["content"] for answer in alone] == expected

        async def together(sampling=sampling) -> list[str]:
            async with openai.AsyncOpenAI(
                base_url=f"{default_server.url}/v1", api_key="x", timeout=60
            ) as client:

                async def one(prompt: str) -> str:
                    stream = await client.chat.completions.create(**body(prompt, **sampling), stream=True)
                    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

                return list(await asyncio.gather(*(one(prompt) for prompt in PROMPTS)))

        assert asyncio.run(together()) == expected


def test_the_real_thing_answers(default_server):
    answer = default_server.chat("What is the capital of France?", temperature=0).json()
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_scores_are_those_of_the_engine(default_server, direct):
    """The pattern of evaluation harnesses against `LLM.score`, and greedy continuation marked as such."""
    text = "The quick brown fox jumps over the lazy dog"
    ids = direct.tokenize(text)
    score = direct.score(ids)
    for most in (0, 1):
        answer = default_server.complete(
            [ids], echo=True, logprobs=1, max_tokens=most, seed=1234, temperature=0
        ).json()
        logprobs = answer["choices"][0]["logprobs"]
        assert logprobs["token_logprobs"][1 : len(ids)] == pytest.approx(score.logprobs, abs=1e-5)
        assert answer["choices"][0]["text"].startswith(text)
        for value, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
            assert value <= max(top.values())


def test_a_long_prompt_is_reused(default_server):
    prompt = "Repeat after me. " * 40
    first = default_server.chat(prompt, temperature=0, max_tokens=2).json()["usage"]
    again = default_server.chat(prompt, temperature=0, max_tokens=2).json()["usage"]
    assert again["prompt_tokens"] == first["prompt_tokens"]
    assert again["prompt_tokens_details"]["cached_tokens"] >= 128
    other = default_server.chat(prompt, temperature=0, max_tokens=2, cache_salt="mine").json()["usage"]
    assert other["prompt_tokens_details"]["cached_tokens"] == 0


def test_clients_that_leave_hold_no_page(default_server, check_idle):
    """Figures 1 and 3 on the real engine, small."""

    def leave(number: int) -> None:
        with httpx.Client(base_url=default_server.url, trust_env=False) as client:
            try:
                with client.stream(
                    "POST", "/v1/chat/completions", json=body(f"count {number}", stream=True, max_tokens=200)
                ) as response:
                    for _ in zip(response.iter_lines(), range(number % 7), strict=False):
                        pass
            except httpx.HTTPError:
                pass

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(leave, range(24)))
    check_idle(default_server)


def test_a_killed_worker_comes_back_with_the_same_answers(default_server, wait_until):
    """Figure 9 on the real engine."""
    before = default_server.chat(PROMPTS[0], temperature=0).json()["choices"]
    models = default_server.service.models
    killed = models.resident("smollm2").link.pid
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: (now := models.resident("smollm2")) is not None and now.link.pid != killed, 60)
    after = default_server.chat(PROMPTS[0], temperature=0).json()["choices"]
    assert after[0]["message"] == before[0]["message"]
