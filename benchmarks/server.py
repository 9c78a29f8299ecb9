"""What the server costs: 8 streams through HTTP against the same engine in this process, and the front's own time.

    python benchmarks/server.py [MODEL] [--threads N] [--rounds N]

Interleaved, so that a busy machine slows both. `throughput`: tokens a second of 8 concurrent streams, as a share of
`LLM.chat` from 8 threads with the same engine threads and the same conversations. No two conversations share a page
of their prompts, so that neither side finds any of it cached. `front`: a request for one token over HTTP, less the
same request to the `LLM`, at the median. Clients are sockets and a search for the last event: what a client library
takes of the machine is not the server's. `processor`: what front and worker took of it a streamed token.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil

from octavo import LLM, SamplingParams
from octavo.types import Message

STREAMS = 8
NEW_TOKENS = 96


def conversation(round_number: int, stream: int) -> list[Message]:
    """Different from its first words on: a template's own system prompt would be shared, and found by one side."""
    return [
        {"role": "system", "content": f"{round_number}-{stream} is your number. You tell stories."},
        {"role": "user", "content": "Write a long story about a lighthouse keeper."},
    ]


async def streams(port: int, model: str, round_number: int) -> float:
    """Tokens a second of all streams together."""

    async def one(number: int) -> int:
        answer = await post(
            port,
            {
                "model": model,
                "messages": conversation(round_number, number),
                "max_tokens": NEW_TOKENS,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        )
        last = answer.rpartition(b'data: {"id"')[2]
        usage = json.loads(b'{"id"' + last.partition(b"\n")[0])["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0
        tokens: int = usage["completion_tokens"]
        return tokens

    started = time.perf_counter()
    tokens = await asyncio.gather(*(one(number) for number in range(STREAMS)))
    seconds = time.perf_counter() - started
    assert tokens == [NEW_TOKENS] * STREAMS
    return STREAMS * NEW_TOKENS / seconds


def request_bytes(port: int, body: dict[str, object], connection: str) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
        f"connection: {connection}\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def post(port: int, body: dict[str, object]) -> bytes:
    """The whole answer, read as it comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request_bytes(port, body, "close"))
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200"), answer[:400]
    return answer


def direct(llm: LLM, round_number: int) -> float:
    """The same work without a server. Threads stand for clients, since `chat` takes one conversation."""
    params = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    with ThreadPoolExecutor(STREAMS) as threads:
        started = time.perf_counter()
        done = list(
            threads.map(lambda n: llm.chat(conversation(round_number, n), params), range(STREAMS)),
        )
        seconds = time.perf_counter() - started
    assert all(each.usage.completion_tokens == NEW_TOKENS for each in done)
    return STREAMS * NEW_TOKENS / seconds


def one_token(client: socket.socket, llm: LLM, model: str, number: int) -> tuple[float, float]:
    """Seconds over HTTP, and without."""
    messages: list[Message] = [{"role": "user", "content": f"Hi {number}"}]
    body: dict[str, object] = {"model": model, "messages": messages, "max_tokens": 1, "temperature": 0}
    request = request_bytes(client.getpeername()[1], body, "keep-alive")
    started = time.perf_counter()
    client.sendall(request)
    answer = b""
    while not is_whole(answer):
        answer += client.recv(1 << 16)
    over_http = time.perf_counter() - started
    assert answer.startswith(b"HTTP/1.1 200"), answer[:400]
    started = time.perf_counter()
    llm.chat(messages, SamplingParams(max_new_tokens=1, temperature=0.0))
    return over_http, time.perf_counter() - started


def is_whole(answer: bytes) -> bool:
    head, _, body = answer.partition(b"\r\n\r\n")
    _, found, length = head.partition(b"content-length: ")
    return bool(found) and len(body) == int(length.partition(b"\r\n")[0])


def processor_seconds(front: psutil.Process) -> dict[str, float]:
    """Of the front and of its worker."""
    found = {}
    for name, process in (("front", front), ("worker", front.children()[0])):
        spent = process.cpu_times()
        found[name] = spent.user + spent.system
    return found


def is_ready(client: http.client.HTTPConnection) -> bool:
    try:
        client.request("GET", "/ready")
        answer = client.getresponse()
        answer.read()
    except OSError:
        client.close()
        return False
    return answer.status == 200


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--threads", type=int, default=1, help="of the engine, on both sides")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    named = [] if given.model is None else ["-m", f"bench={given.model}"]
    common = {"context": 1024, "threads": given.threads, "max_sequences": STREAMS}
    flags = [part for key, value in common.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    server = subprocess.Popen(
        [sys.executable, "-m", "octavo", "serve", *named, "--port", str(port), *flags],
        stderr=subprocess.DEVNULL,
        env=os.environ,
    )
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        with LLM(given.model, device="cpu", **common) as llm:
            while not is_ready(client):
                time.sleep(0.1)
            client.request("GET", "/v1/models")
            model = json.loads(client.getresponse().read())["data"][0]["id"]
            front = psutil.Process(server.pid)
            ratios, spent = [], {"front": 0.0, "worker": 0.0}
            for number in range(given.rounds + 1):
                before = processor_seconds(front)
                served = asyncio.run(streams(port, model, number))
                after = processor_seconds(front)
                alone = direct(llm, number)
                if number:  # the first one warms both
                    ratios.append(served / alone)
                    spent = {name: spent[name] + after[name] - before[name] for name in spent}
                    print(f"served {served:.1f} tok/s, direct {alone:.1f} tok/s, ratio {served / alone:.3f}")
            tokens = STREAMS * NEW_TOKENS * given.rounds
            with socket.create_connection(("127.0.0.1", port)) as connection:
                times = [one_token(connection, llm, model, number) for number in range(110)][10:]
            over_http = statistics.median(http - plain for http, plain in times)
            print(f"throughput ratio: median {statistics.median(ratios):.3f}")
            print("processor:", ", ".join(f"{k} {1e3 * v / tokens:.2f} ms a token" for k, v in spent.items()))
            print(f"front: median {1000 * over_http:.2f} ms more than the engine alone")
    finally:
        client.close()
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
