"""The front's end of one worker: starts it, sends requests, and hands each event to the stream it belongs to.

Asynchronous, on the front's loop. Knows nothing of HTTP, nor which model to run: `octavo.server.models` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from octavo.errors import OctavoError
from octavo.server import sandbox, wire
from octavo.server.settings import LinkName
from octavo.types import FinishReason, Request, TokenEvent
from octavo.version import __version__

WORKER_COMMAND = ("-m", "octavo.server.worker")
"""What `octavo.server.sandbox` starts for a model; tests put another in its place."""

_log = logging.getLogger("octavo.server")

Sink = Callable[[TokenEvent], None]
"""Where a request's events go; called on the loop, must not block or raise."""


MakeRoom = Callable[[int], Awaitable[None]]
"""Called with the bytes a planned model needs, before it takes them; raises where there is no room for it."""


class WorkerLostError(OctavoError):
    """The worker ended while it was needed."""

    code = "engine_restarting"


def lost(reason: str) -> WorkerLostError:
    return WorkerLostError(f"the model's worker ended ({reason})", remedy="Try again: it is being restarted.")


async def _start(command: Sequence[str], link: LinkName) -> sandbox.Child:
    """A started child; none is left where this is cancelled on the way."""
    # A bare future, not a task: nobody else cancels it, so its child cannot get lost.
    start = functools.partial(sandbox.start, command, link=link)
    starting = asyncio.get_running_loop().run_in_executor(None, start)
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        starting.add_done_callback(_discard)
        raise


def _discard(starting: asyncio.Future[sandbox.Child]) -> None:
    if not starting.cancelled() and starting.exception() is None:
        starting.result().kill()
        starting.result().connection.close()


class WorkerLink:
    """One worker, from its start to its end. `load` first; then `submit` and `cancel`; `close` at any time."""

    def __init__(
        self, make_room: MakeRoom, command: Sequence[str] = WORKER_COMMAND, link: LinkName = "auto"
    ) -> None:
        self._make_room = make_room
        self._command = command
        self._link = link
        self._child: sandbox.Child | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._keys = itertools.count()
        self._sinks: dict[int, Sink] = {}
        self._loaded: asyncio.Future[wire.Ready] | None = None
        self._room: asyncio.Task[None] | None = None
        self._facts: list[asyncio.Future[Mapping[str, Any]]] = []
        self.needed_bytes: int | None = None
        """What the plan needs, as soon as there is one."""
        self.progress: wire.Loading | None = None
        self.ended: asyncio.Event = asyncio.Event()
        """Set when the worker is gone and every open request has been told."""
        self.reason = ""

    @property
    def open_requests(self) -> int:
        return len(self._sinks)

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    async def load(self, settings: Mapping[str, Any]) -> wire.Ready:
        """Start the worker and wait for its model. Raises what loading raised, and WorkerLostError."""
        self._loaded = asyncio.get_running_loop().create_future()
        self._child = await _start(self._command, self._link)
        reader, self._writer = await asyncio.open_connection(sock=self._child.connection)
        self._reading = asyncio.create_task(self._read(reader))
        self._send(wire.Load(__version__, settings))
        return await self._loaded

    def end_with(self, token_ids: frozenset[int]) -> None:
        """Once, before the first request: what ends a text. No effect where the worker is gone."""
        self._send(wire.Ends(tuple(sorted(token_ids))))

    def submit(self, request: Request, sink: Sink) -> int:
        """Send a request; its events go to `sink`, the last with a finish reason. Raises WorkerLostError."""
        if self._writer is None or self.ended.is_set():
            raise lost(self.reason)
        key = next(self._keys)
        self._sinks[key] = sink
        try:
            self._send(wire.Submit(key, request))
        except BaseException:
            del self._sinks[key]
            raise
        return key

    def cancel(self, key: int) -> None:
        """Stop a request; its sink is not called again. No effect on one that has ended."""
        if self._sinks.pop(key, None) is not None:
            self._send(wire.Cancel(key))

    async def facts(self, timeout_seconds: float = 2.0) -> Mapping[str, Any]:
        """`Backend.info()` now; {} where the worker does not answer in time."""
        if self._writer is None or self.ended.is_set():
            return {}
        answer: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
        self._facts.append(answer)
        self._send(wire.AskFacts())
        try:
            async with asyncio.timeout(timeout_seconds):
                return await answer
        except TimeoutError:
            return {}

    async def close(self) -> None:
        """End the worker: what it runs ends with an error event, and its memory is back when this returns."""
        self.reason = self.reason or "closed"
        if self._child is None:
            self._end()
            return
        if not self.ended.is_set():
            self._send(wire.Close())
        if self._writer is None:
            self._child.connection.close()
        await self._child.end()
        if self._reading is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading
        if self._room is not None:  # what it holds of others is given back before this returns
            self._room.cancel()
            await asyncio.wait([self._room])

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()

    def _send(self, message: wire.ToWorker) -> None:
        # Not drained: what waits here is bounded by the admitted requests, and the worker reads all the time.
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(wire.encode(message))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        assert self._child is not None
        assert self._writer is not None
        reason = "its connection closed"
        try:
            while True:
                head = await reader.readexactly(wire.LENGTH_BYTES)
                body = await reader.readexactly(wire.frame_length(head))
                self._take(wire.decode(body))
        except (asyncio.IncompleteReadError, OSError):
            pass
        except wire.WireError as error:
            reason = str(error)
            self._child.kill()
        except Exception as error:
            reason = f"internal error: {type(error).__name__}"
            _log.exception("a message of worker %s could not be taken", self.pid)
            self._child.kill()
        finally:
            self._writer.close()
            if self._room is not None:
                self._room.cancel()
            # The connection closes when the process ends: tell the clients first, then learn how it ended.
            self.reason = self.reason or reason
            self._end()
        await self._child.end()
        if self.reason == reason == "its connection closed":
            code = await self._child.wait()
            self.reason = f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    def _take(self, message: Any) -> None:
        match message:
            case wire.Events():
                for event in message.events:
                    ended = event.finish_reason is not None
                    sink = self._sinks.pop(event.key, None) if ended else self._sinks.get(event.key)
                    if sink is not None:
                        sink(event.token_event())
            case wire.Loading():
                self.progress = message
            case wire.Planned():
                self.needed_bytes = message.needed_bytes
                self._room = asyncio.create_task(self._proceed(message.needed_bytes))
            case wire.Ready():
                self._resolve(message)
            case wire.Failed():
                self._resolve(wire.error_from(message.fault))
            case wire.Facts():
                if self._facts:
                    answer = self._facts.pop(0)
                    if not answer.done():
                        answer.set_result(message.facts)
            case _:
                raise wire.WireError(f"a worker does not send {type(message).__name__}")

    async def _proceed(self, needed_bytes: int) -> None:
        try:
            await self._make_room(needed_bytes)
        except OctavoError as error:
            self._resolve(error)
            self.kill()
        else:
            self._send(wire.Proceed())

    def _resolve(self, result: wire.Ready | OctavoError) -> None:
        if self._loaded is None or self._loaded.done():
            return
        if isinstance(result, wire.Ready):
            self._loaded.set_result(result)
        else:
            self._loaded.set_exception(result)

    def _end(self) -> None:
        """Everyone who waits for this worker learns that it is gone."""
        self.ended.set()
        error = lost(self.reason)
        self._resolve(error)
        for key, sink in list(self._sinks.items()):
            try:
                sink(TokenEvent(key, finish_reason=FinishReason.ERROR, error=error))
            except Exception:  # the others must still be told
                _log.exception("request %s could not be told that its worker ended", key)
        self._sinks.clear()
        for answer in self._facts:
            if not answer.done():
                answer.set_result({})
        self._facts.clear()
