"""Figure 38 at the server: minutes of mixed work; what is held at the end is what was held near the start."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

SECONDS = 600
SERVER = Path(__file__).with_name("fake_server.py")


def anonymous_bytes(pid: int) -> int:
    """RssAnon and VmSwap: a leak that was swapped out, or hides among mapped files, counts."""
    found = 0
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "VmSwap"):
            found += int(value.split()[0]) * 1024
    return found


@pytest.mark.parametrize("seconds", [SECONDS])
def test_nothing_grows(seconds):
    process = subprocess.Popen(
        [sys.executable, str(SERVER), json.dumps({"model": "fake?pace_ms=1", "max_queue": 48})],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
    try:
        asyncio.run(_mixed(url, process.pid, seconds))
    finally:
        process.terminate()
        assert process.wait(60) == 0
        process.stdout.close()


async def _mixed(url: str, pid: int, seconds: float) -> None:
    pick = random.Random(5)
    end = time.monotonic() + seconds
    seen: dict[int, int] = {}
    held: list[int] = []
    rates: list[int] = []

    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        while (await client.get("/ready")).status_code != 200:
            await asyncio.sleep(0.1)

        async def one() -> None:
            content = pick.choice(["hello!stop", "long " * 60, "!nan:3", "!slow:5 x!stop", "x" * 5000])
            body = {"model": "fake", "messages": [{"role": "user", "content": content}], "max_tokens": 100}
            stream = pick.random() < 0.7
            try:
                async with client.stream(
                    "POST", "/v1/chat/completions", json={**body, "stream": stream}
                ) as response:
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
                family = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
                held.append(sum(anonymous_bytes(each) for each in family))

        await asyncio.gather(watch(), *(worker() for _ in range(64)))
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
