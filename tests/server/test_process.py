"""The server as a process: what it imports, how it drains (figure 10), and that nothing of it stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

FAKE_SERVER = Path(__file__).with_name("fake_server.py")


class Process:
    def __init__(self, **options: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(FAKE_SERVER), json.dumps(options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{self.process.stdout.readline().strip()}"
        end = time.monotonic() + 30
        while httpx.get(f"{self.url}/ready", trust_env=False).status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.02)
        self.children = psutil.Process(self.process.pid).children(recursive=True)

    def stream(self, content: str) -> tuple[int, str]:
        body = {
            "model": "fake",
            "stream": True,
            "max_tokens": 1000,
            "messages": [{"role": "user", "content": content}],
        }
        response = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=30, trust_env=False)
        return response.status_code, response.text

    def streams(self, count: int, content: str) -> list[tuple[int, str]]:
        """Starts `count` streams; the list fills as they end."""
        results: list[tuple[int, str]] = []
        threads = [
            threading.Thread(target=lambda n=n: results.append(self.stream(f"{n} {content}")))
            for n in range(count)
        ]
        for thread in threads:
            thread.start()
        self.threads = threads
        return results

    def wait_running(self, count: int) -> None:
        """Until this many are with the engine: a machine may be slow to start them."""
        end = time.monotonic() + 60
        while f'octavo_engine_running{{model="fake"}} {count}.0' not in self.metrics():
            assert time.monotonic() < end
            time.sleep(0.05)

    def metrics(self) -> str:
        return httpx.get(f"{self.url}/metrics", trust_env=False).text

    def end(self, seconds: float) -> int:
        code = self.process.wait(seconds)
        for thread in getattr(self, "threads", ()):
            thread.join(10)
        _, left = psutil.wait_procs(self.children, timeout=2)
        # Where nobody adopts orphans, as in some containers, an ended child stays as a zombie.
        assert all(child.status() == psutil.STATUS_ZOMBIE for child in left), "a child was left behind"
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdout.close()
        self.log = self.process.stderr.read()
        self.process.stderr.close()
        return code


@pytest.fixture
def start():
    made = []

    def make(**options: object) -> Process:
        made.append(Process(**options))
        return made[-1]

    yield make
    for each in made:
        if each.process.poll() is None:
            each.process.kill()
            each.end(10)


def test_what_runs_ends_before_the_server_does(start):
    server = start(drain_seconds=60)
    assert server.children
    results = server.streams(32, "!slow:150 hello there, how are you this fine day!stop")
    server.wait_running(32)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    late = httpx.get(f"{server.url}/v1/models", trust_env=False)
    assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
    assert int(late.headers["retry-after"]) > 0
    assert httpx.get(f"{server.url}/ready", trust_env=False).json()["state"] == "draining"
    assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200
    assert server.end(70) == 0
    assert len(results) == 32
    for status, text in results:
        assert status == 200
        assert text.endswith("data: [DONE]\n\n")


def test_what_takes_longer_than_the_grace_ends_with_an_error(start):
    server = start(drain_seconds=0.5)
    results = server.streams(8, "!hang:3 x")
    server.wait_running(8)
    told = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.end(10) == 0
    assert time.monotonic() - told < 0.5 + 4
    assert len(results) == 8
    for status, text in results:
        assert status == 200
        last = json.loads(text.split("\n\n")[-2].removeprefix("data: "))
        assert last["error"]["type"] == "server_error"
        assert "[DONE]" not in text


def test_a_second_signal_does_not_wait(start):
    server = start(drain_seconds=60)
    server.streams(4, "!hang:3 x")
    server.wait_running(4)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    told = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.end(10) == 0
    assert time.monotonic() - told < 4


def test_interrupt_drains_too_and_an_idle_server_ends_at_once(start):
    server = start(drain_seconds=60)
    told = time.monotonic()
    server.process.send_signal(signal.SIGINT)
    assert server.end(10) == 0
    assert time.monotonic() - told < 4


def test_a_server_that_is_killed_leaves_no_worker(start):
    server = start()
    server.process.kill()
    server.end(10)


def test_nothing_a_user_wrote_is_logged(start):
    """Figure 30: no prompt, key, path, address or traceback in the log at INFO."""
    server = start(drain_seconds=1)
    server.stream("the secret canary!stop")
    server.stream("canary !nan:1")
    server.stream("canary !oom:1")
    server.stream("canary !break:1")
    post = {"headers": {"x-request-id": "evil\tid", "authorization": "Bearer canary-key"}, "trust_env": False}
    httpx.post(f"{server.url}/v1/completions", json={"model": "canary-model", "prompt": "canary"}, **post)
    httpx.post(
        f"{server.url}/v1/completions",
        content=b'{"canary":',
        headers={"content-type": "application/json"},
        trust_env=False,
    )
    httpx.get(f"{server.url}/canary", trust_env=False)
    server.process.send_signal(signal.SIGTERM)
    assert server.end(10) == 0
    assert "numerical_error" in server.log
    assert "/v1/chat/completions 200" in server.log
    for leak in ("canary", "0x7f", "/secret", "Traceback", 'File "', "127.0.0.1:"):
        assert leak not in server.log, leak


def test_the_front_imports_no_torch():
    code = "import octavo.server.run, sys; print(*sys.modules)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OCTAVO_")}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert not {"torch", "triton", "transformers", "huggingface_hub"} & set(found.stdout.split())
    assert "uvicorn" in found.stdout
