"""Figure 38 at the server: minutes of mixed work; what is held at the end is what was held near the start."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import psutil
import pytest

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

SECONDS = 600
MOST_CHILDREN = 4 + 2 + 2
"""For templates, for grammars, and one of each that is about to go."""
MOST_CHILD_BYTES = 128 << 20
SERVER = Path(__file__).with_name("fake_server.py")


def lasting_bytes(pid: int) -> int:
    """Of the front and its workers. The warm children come and go with what is asked: few, and none may grow beyond
    its kind."""
    children = psutil.Process(pid).children(recursive=True)
    warm = [each.pid for each in children if any("_child" in part for part in each.cmdline())]
    assert len(warm) <= MOST_CHILDREN
    assert all(anonymous_bytes(each) < MOST_CHILD_BYTES for each in warm)
    return sum(anonymous_bytes(each) for each in (pid, *(c.pid for c in children if c.pid not in warm)))


def anonymous_bytes(pid: int) -> int:
    """RssAnon and VmSwap: a leak that was swapped out, or hides among mapped files, counts."""
    found = 0
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "VmSwap"):
            found += int(value.split()[0]) * 1024
    return found


FAKE = ("hello!stop", "long " * 60, "!nan:3", "!slow:5 x!stop", "x" * 5000)
REAL = ("Say hello.", "Repeat this: " + "long " * 60, "Why is the sky blue?", "x " * 5000)
CITY = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}}, "required": ["name"]}


@contextlib.contextmanager
def server(**options: object) -> Iterator[tuple[str, int]]:
    """(its URL, its process id)"""
    process = subprocess.Popen(
        [sys.executable, str(SERVER), json.dumps(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}", process.pid
    finally:
        process.terminate()
        assert process.wait(60) == 0
        process.stdout.close()


@pytest.mark.parametrize("seconds", [SECONDS])
def test_nothing_grows(seconds):
    with server(model="fake?pace_ms=1", max_queue=48) as (url, pid):
        asyncio.run(_mixed(url, pid, seconds, FAKE, at_once=64))


@pytest.mark.model
@pytest.mark.parametrize("seconds", [SECONDS])
def test_nothing_grows_with_a_real_model(seconds, default_model_path):
    """With schemas and budgets too: of what they need, some is held by the other children."""
    with server(real=True, model=str(default_model_path), max_queue=12) as (url, pid):
        asyncio.run(_mixed(url, pid, seconds, REAL, at_once=24))


async def _mixed(url: str, pid: int, seconds: float, contents: Sequence[str], *, at_once: int) -> None:
    pick = random.Random(5)
    end = time.monotonic() + seconds
    seen: dict[int, int] = {}
    held: list[int] = []
    rates: list[int] = []

    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:
        while (await client.get("/ready")).status_code != 200:
            await asyncio.sleep(0.1)

        async def one() -> None:
            body = {
                "model": "fake",
                "messages": [{"role": "user", "content": pick.choice(contents)}],
                "max_tokens": 100 if contents is FAKE else 24,
                "stream": pick.random() < 0.7,
            }
            if contents is REAL and pick.random() < 0.3:
                # One of 5,000 schemas, so that caches of them fill and turn over.
                schema = {**CITY, "title": str(pick.randrange(5000))}
                body["response_format"] = {
                    "type": "json_schema",
                    "json_schema": {"name": "city", "schema": schema},
                }
            try:
                async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    seen[response.status_code] = seen.get(response.status_code, 0) + 1
                    leave_after = pick.randrange(1, 40) if pick.random() < 0.3 else 10**6
                    async for _ in response.aiter_lines():
                        leave_after -= 1
                        if leave_after < 0:
                            return
            except httpx.HTTPError:
                seen[0] = seen.get(0, 0) + 1

        async def worker() -> None:
            while time.monotonic() < end:
                await one()

        async def watch() -> None:
            while time.monotonic() < end:
                before = sum(seen.values())
                await asyncio.sleep(seconds / 20)
                rates.append(sum(seen.values()) - before)
                with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):  # one that just went
                    held.append(lasting_bytes(pid))

        await asyncio.gather(watch(), *(worker() for _ in range(at_once)))
        page = (await client.get("/metrics")).text
    print(f"answers {seen}, anonymous bytes {held}, answers a period {rates}")
    assert set(seen) <= {200, 400, 429, 500}
    for name in (
        "octavo_waiting_requests",
        "octavo_engine_running",
        "octavo_engine_waiting",
        "octavo_worker_restarts",
    ):
        values = [line.rpartition(" ")[2] for line in page.splitlines() if line.startswith(name)]
        assert values
        assert set(values) == {"0.0"}
    # A tenth of the time to settle; then the last quarter against the second.
    early, late = held[len(held) // 4 : len(held) // 2], held[-len(held) // 4 :]
    assert sum(late) / len(late) < 1.02 * sum(early) / len(early)
