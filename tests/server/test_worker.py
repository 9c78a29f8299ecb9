"""A worker and the front's link to it: neither is ever mute while the other waits, and neither outlives the other."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path

import pytest

from octavo.server import sandbox, wire, worker_link
from octavo.server.worker import Outbox
from octavo.server.worker_link import WorkerLink
from octavo.types import FinishReason, Request, Sampling, TokenLogprob
from octavo.version import __version__

FAKE_WORKER = (str(Path(__file__).with_name("fake_worker.py")),)
SETTINGS = {"model": "fake", "max_sequences": 8, "context": 512}


async def room(needed_bytes: int) -> None:
    """There is enough."""


def receive(connection: socket.socket):
    def exactly(count: int) -> bytes:
        found = b""
        while len(found) < count:
            found += connection.recv(count - len(found)) or pytest.fail("the connection closed")
        return found

    return wire.decode(exactly(wire.frame_length(exactly(wire.LENGTH_BYTES))))


def test_an_event_too_large_ends_its_request_alone(monkeypatch):
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 2000)
    many = tuple(TokenLogprob(i, -1.0, ((i, -1.0),)) for i in range(1000))
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    with ours, theirs:
        outbox = Outbox(theirs)
        stopped: list[int] = []
        outbox.unsendable = stopped.append
        sent = [wire.Event(key, token_id=key) for key in range(300)]
        sent[77] = wire.Event(77, token_id=77, prompt_logprobs=many)
        for event in sent:
            outbox.put(event)
        found: list[wire.Event] = []
        while len(found) < len(sent):
            found += receive(ours).events
        outbox.flush(5)
    assert [event.key for event in found] == list(range(300))
    assert [event for event in found if event.key != 77] == [event for event in sent if event.key != 77]
    assert found[77].finish_reason is FinishReason.ERROR
    assert "too many to send" in found[77].fault.message
    assert stopped == [77]


def test_a_model_that_cannot_be_described_is_refused(serving, served):
    with serving(served(model="fake?long_number=1"), queue_seconds=15, preload=False) as harness:
        response = harness.chat("x")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "model_unavailable")
        assert harness.service.models.status()["fake"]["code"] == "incompatible_model"


def test_a_sink_that_raises_leaves_nobody_waiting():
    async def main() -> list[FinishReason | None]:
        link = WorkerLink(room, FAKE_WORKER)
        await link.load(SETTINGS)
        reasons = []

        def bad(event):
            raise RuntimeError("a bug")

        hanging = (33, 104, 97, 110, 103, 58, 48)  # !hang:0
        link.submit(Request(hanging, Sampling(), 10), lambda event: reasons.append(event.finish_reason))
        link.submit(Request((97, 98), Sampling(), 10), bad)
        async with asyncio.timeout(10):
            await link.ended.wait()
            await link.close()
        return reasons

    assert asyncio.run(main()) == [FinishReason.ERROR]


def test_a_load_cancelled_at_its_start_leaves_no_process(monkeypatch):
    made: list[sandbox.Child] = []
    start = sandbox.start

    def slow(command, *, link):
        time.sleep(0.3)
        made.append(start(command, link=link))
        return made[0]

    monkeypatch.setattr(worker_link.sandbox, "start", slow)

    async def main() -> int:
        link = WorkerLink(room, FAKE_WORKER)
        loading = asyncio.create_task(link.load(SETTINGS))
        await asyncio.sleep(0.05)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        await link.close()
        while not made:
            await asyncio.sleep(0.02)
        async with asyncio.timeout(10):
            return await made[0].wait()

    try:
        assert asyncio.run(main()) == -9
    finally:
        made[0].kill()


def test_a_worker_whose_front_goes_away_ends_during_its_load():
    async def main() -> int:
        child = sandbox.start(FAKE_WORKER)
        with child.connection:
            for message in (wire.Load(__version__, {**SETTINGS, "model": "fake?load_s=60"}), wire.Proceed()):
                child.connection.sendall(wire.encode(message))
            while not isinstance(await asyncio.to_thread(receive, child.connection), wire.Planned):
                pass
            await asyncio.sleep(0.2)
        try:
            async with asyncio.timeout(10):
                return await child.wait()
        finally:
            child.kill()

    assert asyncio.run(main()) == 0
