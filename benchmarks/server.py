"""What the server costs: 8 streams through HTTP against the same engine in this process, and the front's own time.

    python benchmarks/server.py [MODEL] [--rounds N]

Interleaved, so that a busy machine slows both. `throughput`: tokens a second of 8 concurrent streams, as a share of
`LLM.generate` with the same engine threads. `front`: a request for one token over HTTP, less the same request to the
`LLM`, at the median.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import time

import httpx

from octavo import LLM, SamplingParams

STREAMS = 8
NEW_TOKENS = 96
PROMPT = "Write a long story about a lighthouse keeper number {}."


async def streams(url: str, model: str) -> float:
    """Tokens a second of all streams together."""
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False) as client:

        async def one(number: int) -> int:
            body = {
                "model": model,
                "messages": [{"role": "user", "content": PROMPT.format(number)}],
                "max_tokens": NEW_TOKENS,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
                "cache_salt": f"r{time.perf_counter_ns()}",
            }
            chunks = 0
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                assert response.status_code == 200
                async for line in response.aiter_lines():
                    chunks += line.startswith("data: {")
            return chunks

        started = time.perf_counter()
        await asyncio.gather(*(one(number) for number in range(STREAMS)))
        return STREAMS * NEW_TOKENS / (time.perf_counter() - started)


def direct(llm: LLM, round_number: int) -> float:
    """The same work without a server. Threads stand for clients, since `chat` takes one conversation."""
    from concurrent.futures import ThreadPoolExecutor

    params = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    with ThreadPoolExecutor(STREAMS) as threads:
        started = time.perf_counter()
        list(
            threads.map(
                lambda n: llm.chat(
                    [{"role": "user", "content": PROMPT.format(f"{n} {round_number}")}], params
                ),
                range(STREAMS),
            )
        )
        return STREAMS * NEW_TOKENS / (time.perf_counter() - started)


def one_token(client: httpx.Client, llm: LLM, model: str, number: int) -> tuple[float, float]:
    """Seconds over HTTP, and without."""
    messages = [{"role": "user", "content": f"Hi {number}"}]
    started = time.perf_counter()
    client.post(
        "/v1/chat/completions", json={"model": model, "messages": messages, "max_tokens": 1, "temperature": 0}
    ).raise_for_status()
    over_http = time.perf_counter() - started
    started = time.perf_counter()
    llm.chat(messages, SamplingParams(max_new_tokens=1, temperature=0.0))
    return over_http, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    named = [] if given.model is None else ["-m", f"bench={given.model}"]
    common = {"context": 1024, "threads": 1, "max_sequences": STREAMS}
    flags = [part for key, value in common.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    server = subprocess.Popen(
        [sys.executable, "-m", "octavo", "serve", *named, "--port", str(port), *flags],
        stderr=subprocess.DEVNULL,
        env=os.environ,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        with (
            LLM(given.model, device="cpu", **common) as llm,
            httpx.Client(base_url=url, trust_env=False, timeout=60) as client,
        ):
            while True:
                try:
                    if client.get("/ready").status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                time.sleep(0.1)
            model = client.get("/v1/models").json()["data"][0]["id"]
            ratios = []
            for number in range(given.rounds + 1):
                served, alone = asyncio.run(streams(url, model)), direct(llm, number)
                if number:  # the first one warms both
                    ratios.append(served / alone)
                    print(f"served {served:.1f} tok/s, direct {alone:.1f} tok/s, ratio {served / alone:.3f}")
            times = [one_token(client, llm, model, number) for number in range(60)][10:]
            front = statistics.median(http - plain for http, plain in times)
            print(f"throughput ratio: median {statistics.median(ratios):.3f}")
            print(f"front: median {1000 * front:.2f} ms more than the engine alone")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
