"""What goes wrong while serving, and that it stays where it went wrong: figures 1, 2, 4, 5, 7, 9, 23, 30, 31."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from octavo.server.faults import HttpFault
from octavo.server.models import Suspects

FAKE_SERVER = Path(__file__).with_name("fake_server.py")
POST = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def request_bytes(content: str, **more: object) -> bytes:
    body = json.dumps(
        {"model": "fake", "messages": [{"role": "user", "content": content}], "max_tokens": 200, **more}
    ).encode()
    return POST.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def cut(port: int, request: bytes, after_seconds: float) -> None:
    """Send a request and close the connection some time later, whatever came."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request)
        time.sleep(after_seconds)


def answers(harness, count: int, at_once: int) -> list[tuple[int, bytes, bytes]]:
    """(status, head, body) of `count` requests. Bare connections: a client's pool would be what is measured."""

    async def main() -> list[tuple[int, bytes, bytes]]:
        places = asyncio.Semaphore(at_once)

        async def one(number: int) -> tuple[int, bytes, bytes]:
            request = request_bytes(f"number {number}!stop").replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
            async with places:
                reader, writer = await asyncio.open_connection("127.0.0.1", harness.port)
                writer.write(request)
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
                writer.close()
                await writer.wait_closed()
            return int(head.split(b" ")[1]), head, body

        return list(await asyncio.gather(*(one(number) for number in range(count))))

    return asyncio.run(main())


@pytest.fixture(scope="module")
def slow_module(serving, served):
    with serving(served(model="fake?pace_ms=2", context=4096)) as harness:
        harness.wait_ready()
        yield harness


@pytest.fixture
def slow(slow_module, check_idle):
    yield slow_module
    check_idle(slow_module)


def soak(*values: object) -> object:
    """Full size: hours on a busy machine rather than seconds."""
    return pytest.param(*values, marks=[pytest.mark.soak, pytest.mark.timeout(7200)])


@pytest.mark.parametrize("count", [120, soak(10_000)])
def test_clients_that_leave_a_stream_leave_nothing_behind(slow, check_idle, count):
    """Figure 1: cut while queued, at prefill, at the first token and later."""
    pick = random.Random(1)
    before = slow.engine()
    with ThreadPoolExecutor(24) as threads:
        for number in range(count):
            after = pick.choice([0.0, 0.001, 0.01, 0.05])
            threads.submit(cut, slow.port, request_bytes(f"x{number}", stream=True), after)
    check_idle(slow)
    after = slow.engine()
    assert after["ended"] == after["submitted"]
    assert after["submitted"] > before["submitted"]


@pytest.mark.parametrize("count", [24, soak(500)])
def test_clients_that_leave_a_whole_answer_end_it_too(slow, count):
    """Figure 2: without a stream the request is cancelled as soon, long before its 2,000 tokens are made."""
    before = slow.engine()
    with ThreadPoolExecutor(8) as threads:
        for number in range(count):
            threads.submit(cut, slow.port, request_bytes(f"y{number}", max_tokens=2000), 0.1)
    gone = time.perf_counter()
    while (now := slow.engine())["running"] or now["waiting"]:
        assert time.perf_counter() - gone < 5
    assert now["cancelled"] - before["cancelled"] == now["submitted"] - before["submitted"]
    assert now["tokens"] - before["tokens"] < count * 1000


def test_a_request_that_fails_fails_alone(fake):
    """Figures 7 and 8, at the server: the neighbours' answers are what they are without it."""
    with ThreadPoolExecutor(12) as threads:
        bad = [threads.submit(fake.chat, f"!{what}:3 x") for what in ("nan", "oom") * 2]
        good = [threads.submit(fake.chat, f"neighbour {number}!stop") for number in range(8)]
        for number, future in enumerate(good):
            answer = future.result().json()
            assert answer["choices"][0]["message"]["content"] == f"neighbour {number}!stop"
        for future, code in zip(bad, ("numerical_error", "internal_error") * 2, strict=True):
            response = future.result()
            assert response.status_code == 500
            assert response.json()["error"]["code"] == code
            assert response.headers["x-should-retry"] == "false"


def test_an_error_in_a_stream_is_its_last_event(fake):
    """No [DONE], no finish_reason: nobody takes the answer for whole."""
    text = fake.chat("!nan:3 x", stream=True).text
    last = json.loads(text.split("\n\n")[-2].removeprefix("data: "))
    assert last["error"]["code"] == "numerical_error"
    assert "[DONE]" not in text
    assert '"finish_reason":"stop"' not in text


def test_answers_do_not_mix(fake):
    """Figure 31: 64 at once, all with the same x-request-id; each gets its own text."""

    def one(number: int) -> tuple[int, str]:
        canary = f"canary-{number:04d}!stop"
        body = {"model": "fake", "messages": [{"role": "user", "content": canary}]}
        response = httpx.post(
            f"{fake.url}/v1/chat/completions",
            json=body,
            headers={"x-request-id": "same"},
            timeout=30,
            trust_env=False,
        )
        return number, response.json()["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(64) as threads:
        for number, text in threads.map(one, range(64)):
            assert text == f"canary-{number:04d}!stop"


@pytest.mark.parametrize(("count", "at_once", "cap"), [(200, 64, 16), soak(4096, 1024, 128)])
def test_overload_is_refused_at_once(serving, served, check_idle, count, at_once, cap):
    """Figure 5: only 200 and 429, each 429 with Retry-After, and nothing hangs."""
    with serving(served(model="fake?pace_ms=1"), max_queue=cap) as harness:
        harness.wait_ready()
        found = answers(harness, count, at_once)
        counts = {status: sum(each[0] == status for each in found) for status in (200, 429)}
        assert sum(counts.values()) == count
        assert min(counts.values()) > 0
        for status, head, body in found:
            if status == 429:
                (seconds,) = re.findall(rb"retry-after: (\d+)", head)
                assert 1 <= int(seconds) <= 120
                assert json.loads(body)["error"]["type"] == "rate_limit_error"
        check_idle(harness)


def test_the_queue_is_bounded_in_tokens(serving, served):
    with serving(served(model="fake", max_sequences=1), max_queue_tokens=600) as harness:
        harness.wait_ready()
        with ThreadPoolExecutor(4) as threads:
            first = threads.submit(harness.chat, "!slow:20 first", max_tokens=60)
            time.sleep(0.3)
            second = threads.submit(harness.chat, "a" * 380, max_tokens=1)
            time.sleep(0.3)
            third = harness.chat("a" * 380, max_tokens=1)
            assert (third.status_code, third.json()["error"]["code"]) == (429, "token_budget")
            assert first.result().status_code == second.result().status_code == 200


@pytest.mark.parametrize("count", [3, soak(50)])
def test_slow_readers_hold_up_nobody_and_are_cut_off(serving, served, check_idle, count):
    """Figure 4: clients that read nothing are cancelled after the stall time; others do not notice."""
    model = served(model="fake", context=60_000, max_sequences=64)
    with serving(model, stall_seconds=1.0) as harness:
        harness.wait_ready()
        before = psutil.Process().memory_info().rss
        stalled = []
        for number in range(count):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", harness.port))
            connection.sendall(
                request_bytes(f"stalled {number}", stream=True, max_tokens=50_000, logprobs=True)
            )
            stalled.append(connection)
        waits = []
        for number in range(max(10, count)):
            started = time.perf_counter()
            assert harness.chat(f"quick {number}!stop").status_code == 200
            waits.append(time.perf_counter() - started)
        assert psutil.Process().memory_info().rss - before < 50 << 20
        check_idle_by = time.monotonic() + 40
        while harness.engine()["running"]:
            assert time.monotonic() < check_idle_by
            time.sleep(0.1)
        assert sorted(waits)[len(waits) // 2] < 1
        print(f"{count} stalled: others waited {sorted(waits)}")
        for connection in stalled:
            connection.close()
        check_idle(harness)


@pytest.mark.parametrize(("turns", "streams"), [(3, 16), soak(20, 64)])
def test_a_worker_that_dies_ends_its_streams_and_comes_back(serving, served, check_idle, turns, streams):
    """Figure 9: an error event on each stream within 5 s, /ready says so, then it serves again."""
    with serving(served(model="fake?load_s=0.3")) as harness:
        harness.wait_ready()
        for turn in range(turns):
            results: list[tuple[float, str]] = []

            def stream(number: int, turn: int = turn, results: list[tuple[float, str]] = results) -> None:
                text = harness.chat(f"{turn} {number} !hang:4", stream=True).text
                results.append((time.perf_counter(), text))

            threads = [threading.Thread(target=stream, args=(number,)) for number in range(streams)]
            for thread in threads:
                thread.start()
            resident = harness.service.models.resident("fake")
            deadline = time.monotonic() + 10
            while resident.link.open_requests < streams:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(0.2)
            killed = time.perf_counter()
            os.kill(resident.link.pid, signal.SIGKILL)
            while (status := harness.client.get("/ready")).status_code == 200:
                assert time.perf_counter() - killed < 2
            assert status.json()["models"]["fake"]["state"] in ("restarting", "loading")
            for thread in threads:
                thread.join(10)
            assert len(results) == streams
            for ended, text in results:
                assert ended - killed < 5
                assert "engine_restarting" in text
                assert "[DONE]" not in text
            harness.wait_ready(15)
            assert harness.chat("again!stop").status_code == 200
        assert harness.service.models.restarts == turns
        check_idle(harness)


def test_an_engine_that_breaks_is_replaced(serving, wait_until, check_idle):
    with serving() as harness:
        harness.wait_ready()
        response = harness.chat("!break:2 x")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_restarting")
        assert "deadbeef" not in response.text
        # A client is told to come again while the worker is on its way out; then it is served.
        wait_until(lambda: harness.chat("after!stop").status_code == 200, 40)
        check_idle(harness)


def test_a_body_that_killed_two_workers_is_refused(serving, served):
    with serving() as harness:
        harness.wait_ready()
        for _ in range(2):
            assert harness.chat("!crash:1 x").status_code == 503
            harness.wait_ready()
        response = harness.chat("!crash:1 x")
        assert (response.status_code, response.json()["error"]["code"]) == (400, "request_refused")
        assert harness.chat("innocent!stop").status_code == 200
        assert harness.service.models.restarts == 2


def test_one_crash_makes_nobody_a_culprit():
    suspects = Suspects()
    for _ in range(5):
        suspects.blame(b"body", 1)
    suspects.check(b"body")
    suspects.blame(b"body", 2)
    with pytest.raises(HttpFault):
        suspects.check(b"body")


def test_a_model_that_cannot_be_loaded_is_said_without_details(serving, served):
    with serving(served(model="fake?fails=1")) as harness:
        response = harness.chat("x")
        assert response.status_code in (500, 503)
        assert not re.search(r"0x[0-9a-f]{6}|/secret|Traceback", response.text)
        assert harness.client.get("/ready").json()["models"]["fake"]["state"] == "failed"
        assert harness.client.get("/health").status_code == 200


def test_health_answers_while_a_model_loads(serving, served):
    with serving(served(model="fake?load_s=1")) as harness:
        times = []
        while (state := harness.client.get("/ready")).status_code == 503:
            assert state.json()["models"]["fake"]["state"] in ("unloaded", "loading")
            started = time.perf_counter()
            assert harness.client.get("/health").json() == {"status": "ok"}
            times.append(time.perf_counter() - started)
        assert sorted(times)[len(times) * 9 // 10] < 0.1


def test_a_deadline_ends_a_request(serving, served, check_idle):
    with serving(served(), request_seconds=0.5) as harness:
        harness.wait_ready()
        response = harness.chat("!hang:3 x")
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert response.headers["x-should-retry"] == "false"
        text = harness.chat("!hang:3 y", stream=True).text
        assert "deadline_exceeded" in text
        check_idle(harness)


def test_a_request_waits_only_so_long_for_its_first_token(serving, served, check_idle):
    with serving(served(), queue_seconds=0.3) as harness:
        harness.wait_ready()
        assert harness.chat("!hang:0 x").json()["error"]["code"] == "deadline_exceeded"
        check_idle(harness)


def test_more_choices_than_slots_take_turns(serving, served, check_idle):
    """Once its first has begun a request is no longer in the queue, however long the last has to wait."""
    with serving(served(max_sequences=1), queue_seconds=0.6) as harness:
        harness.wait_ready()
        response = harness.chat("!slow:40 xxxxxxxxxxxxxxxxxxxx", n=3)
        assert response.status_code == 200
        assert [choice["finish_reason"] for choice in response.json()["choices"]] == ["length"] * 3
        check_idle(harness)


# Figure 23: limits of HTTP.


@pytest.fixture(scope="module")
def tight(serving):
    with serving(body_seconds=0.5, header_seconds=0.5, max_body_bytes=100_000, max_connections=40) as harness:
        harness.wait_ready()
        yield harness


def read_all(connection: socket.socket) -> bytes:
    connection.settimeout(5)
    answer = b""
    while chunk := connection.recv(65536):
        answer += chunk
    return answer


def test_a_body_too_large(tight):
    for body in (b"x" * 100_001, iter([b"x" * 60_000, b"y" * 60_000])):
        response = tight.client.post(
            "/v1/completions", content=body, headers={"content-type": "application/json"}
        )
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_headers_too_large(tight):
    with socket.create_connection(("127.0.0.1", tight.port)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "headers_too_large"


def test_a_slow_body(tight):
    with socket.create_connection(("127.0.0.1", tight.port)) as connection:
        connection.sendall(POST.encode() + b"Content-Length: 100\r\n\r\n{")
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("sent", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow"])
def test_slow_headers(tight, sent):
    with socket.create_connection(("127.0.0.1", tight.port)) as connection:
        connection.sendall(sent)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_slow_headers_of_a_second_request(tight):
    with socket.create_connection(("127.0.0.1", tight.port)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(0.2)
        connection.sendall(b"GET /hea")
        answer = read_all(connection)
    assert answer.count(b"HTTP/1.1 ") == 2
    assert b"HTTP/1.1 408 " in answer


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="so many open files are Linux's to allow")
def test_ten_thousand_idle_connections():
    """In a process of its own; while they come, and while they are there."""
    import resource

    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 15_000:
        pytest.skip("needs ulimit -n 15000")
    options = json.dumps({"max_connections": 12_000, "header_seconds": 300})
    with contextlib.ExitStack() as idle:
        server = idle.enter_context(
            subprocess.Popen(
                [sys.executable, str(FAKE_SERVER), options],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )
        idle.callback(server.terminate)
        assert server.stdout is not None
        port = int(server.stdout.readline())
        client = idle.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False))
        while client.get("/ready").status_code != 200:
            time.sleep(0.1)

        def asked() -> float:
            started = time.perf_counter()
            assert client.get("/health").status_code == 200
            return time.perf_counter() - started

        coming = []
        for number in range(10_000):
            idle.enter_context(socket.create_connection(("127.0.0.1", port)))
            if number % 50 == 0:
                coming.append(asked())
        there = [asked() for _ in range(500)]
    for name, seconds in (("coming", coming), ("there", there)):
        seconds.sort()
        print(f"{name}: p50 {seconds[len(seconds) // 2]:.4f} s, most {seconds[-5:]} s")
    assert there[len(there) * 99 // 100] < 0.1
    assert coming[len(coming) * 95 // 100] < 0.1


def test_idle_connections_are_bounded_and_health_goes_on(tight):
    idle = [socket.create_connection(("127.0.0.1", tight.port)) for _ in range(60)]
    try:
        with socket.create_connection(("127.0.0.1", tight.port)) as over:
            assert read_all(over).startswith(b"HTTP/1.1 503 ")
    finally:
        for connection in idle:
            connection.close()
    started = time.perf_counter()
    assert tight.client.get("/health").status_code == 200
    assert time.perf_counter() - started < 1
