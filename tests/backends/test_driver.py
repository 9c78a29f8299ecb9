"""The driver's thread: events reach their sinks, and every way to end ends each request and the backend."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from queue import SimpleQueue

import pytest

from octavo.backends.driver import Driver
from octavo.errors import ClosedError
from octavo.types import FinishReason, Request, Sampling, TokenEvent

REQUEST = Request((1,), Sampling(), max_new_tokens=1)


class FakeBackend:
    """Every request gets a token a step until it is cancelled; `failure` is raised by the next step."""

    def __init__(self):
        self.open = set()
        self.cancelled = SimpleQueue()
        self.failure = None
        self.closed = 0
        self.stepping = threading.Lock()

    def submit(self, request):
        self.open.add(number := len(self.open))
        return number

    def cancel(self, request_id):
        self.cancelled.put(request_id)

    def step(self, timeout_seconds):
        with self.stepping:
            if self.failure is not None:
                raise self.failure
            ended = {self.cancelled.get() for _ in range(self.cancelled.qsize())} & self.open
            self.open -= ended
            time.sleep(0.001)
            running = [TokenEvent(number, token_id=7) for number in sorted(self.open)]
            return [*running, *(TokenEvent(n, finish_reason=FinishReason.CANCELLED) for n in ended)]

    def close(self):
        assert not self.stepping.locked()
        self.closed += 1


@pytest.fixture
def backend():
    return FakeBackend()


def last(events):
    while (event := events.get(timeout=5)).finish_reason is None:
        assert event.token_id == 7
    return event


def test_events_go_to_their_own_sink_until_cancelled(backend):
    driver = Driver(backend)
    one, other = SimpleQueue(), SimpleQueue()
    first, second = driver.submit(REQUEST, one.put), driver.submit(REQUEST, other.put)
    driver.cancel(first)
    assert last(one) == TokenEvent(first, finish_reason=FinishReason.CANCELLED)
    driver.cancel(second)
    assert last(other) == TokenEvent(second, finish_reason=FinishReason.CANCELLED)
    driver.close()


@pytest.mark.parametrize("end", [Driver.close, Driver.stop])
def test_the_end_ends_every_request_and_the_backend(backend, end):
    driver = Driver(backend)
    events = SimpleQueue()
    driver.submit(REQUEST, events.put)
    end(driver)
    assert isinstance(last(events).error, ClosedError)
    driver.close()
    assert backend.closed == 1
    assert not driver._thread.is_alive()
    with pytest.raises(ClosedError, match="closed"):
        driver.submit(REQUEST, events.put)


def test_a_backend_that_raises_ends_every_request_with_its_error(backend, caplog):
    driver = Driver(backend)
    events = SimpleQueue()
    driver.submit(REQUEST, events.put)
    backend.failure = RuntimeError("the device is gone")
    assert last(events).error is backend.failure
    driver.close()
    assert backend.closed == 1
    assert "the engine stopped" in caplog.text
    with pytest.raises(ClosedError, match="the device is gone"):
        driver.submit(REQUEST, events.put)


def test_stopping_takes_no_lock(backend):
    driver = Driver(backend)
    with driver._lock:
        stopper = threading.Thread(target=driver.stop, daemon=True)
        stopper.start()
        stopper.join(5)
        assert not stopper.is_alive()
    driver.close()


def test_whatever_ends_the_thread_those_who_wait_are_told(backend, caplog):
    driver, events = Driver(backend), []
    driver.submit(REQUEST, events.append)
    backend.failure = SystemExit(3)
    assert "SystemExit" in str(driver.wait())
    assert events[-1].finish_reason is FinishReason.ERROR
    assert backend.closed == 1


def test_a_thread_that_cannot_start_leaves_nothing_open(backend, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError):
        Driver(backend)
    assert backend.closed == 1


def test_the_end_of_the_program_waits_for_the_step_and_closes():
    program = """
import time
from octavo.backends.driver import Driver

class Backend:
    def step(self, timeout_seconds):
        time.sleep(0.3)
        print("stepped", flush=True)
        return []
    def close(self):
        print("closed", flush=True)

Driver(Backend())
time.sleep(0.1)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "stepped\nclosed\n", "")
