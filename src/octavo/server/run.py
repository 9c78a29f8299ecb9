"""Runs the server: uvicorn around the app, and its end: drain on the first SIGTERM or SIGINT, stop on the second."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence

import uvicorn

from octavo.errors import (
    DeviceError,
    IncompatibleModelError,
    ModelNotFoundError,
    OctavoError,
    ResourceError,
    UsageError,
)
from octavo.server.access import NO_KEYS, Keys
from octavo.server.app import App
from octavo.server.http_protocol import protocol_class
from octavo.server.models import Models, Resident, ServedModel
from octavo.server.service import Service
from octavo.server.settings import ServerSettings
from octavo.server.worker_link import WORKER_COMMAND

_ACCEPTED_AT_ONCE = 64
_BACKLOG = 2048
"""Connections that may wait to be accepted. asyncio takes its own number for both, and would accept them all in one go,
in which nobody is answered."""
_ABORT_SECONDS = 1.5
"""What aborted requests get to send their last event."""

_NEVER = (ModelNotFoundError, IncompatibleModelError, ResourceError, DeviceError, UsageError)
"""What trying again will hardly change while the server runs; a download, whoever starts the server tries again."""

_log = logging.getLogger("octavo.server")


class _Uvicorn(uvicorn.Server):
    """Leaves the signals to `Server`, which drains first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """One server from start to end, on the running loop."""

    def __init__(
        self,
        settings: ServerSettings,
        served: Sequence[ServedModel],
        keys: Keys,
        *,
        admin_keys: Keys = NO_KEYS,
        command: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        self._settings = settings
        models = Models(
            served,
            memory_bytes=settings.memory_bytes,
            idle_unload_seconds=settings.idle_unload_seconds,
            command=command,
            worker_link=settings.worker_link,
        )
        self.service = Service(settings, models)
        self.app = App(self.service, keys, admin_keys)
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                self.app,
                host=settings.host,
                port=settings.port,
                http=protocol_class(settings),
                ws="none",
                lifespan="off",
                access_log=False,
                proxy_headers=False,  # nothing here goes by who a proxy says is asking
                log_config=None,
                server_header=False,
                h11_max_incomplete_event_size=settings.max_header_bytes,
                timeout_keep_alive=75,
                backlog=_ACCEPTED_AT_ONCE,
            )
        )
        self._stopping: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._hopeless: OctavoError | None = None
        """Why the only model, which was to be loaded at the start, never can be."""

    async def run(self, started: Callable[[int], None]) -> None:
        """Serve until `stop`. `started` is called with the port, once it listens.

        Raises DeviceError where the address is taken, and what loading raised where the only model can never be
        loaded. One of several may go missing: /ready says so.
        """
        try:
            preloading = self.service.models.start(preload=self._settings.preload)
            if preloading is not None and len(self.service.models.names) == 1:
                preloading.add_done_callback(self._note_load)
            serving = asyncio.create_task(self._serve())
            while not (self._uvicorn.started or serving.done()):
                await asyncio.sleep(0.005)
            if self._uvicorn.started:
                self._lengthen_backlog()
                started(self._port())
            await serving
            if self._hopeless is not None:
                raise self._hopeless
        finally:
            await self.service.models.close()
            self.service.close()

    def _note_load(self, preloading: asyncio.Task[Resident]) -> None:
        error = None if preloading.cancelled() else preloading.exception()
        if isinstance(error, _NEVER) and self._stopping is None:
            self._hopeless = error
            self.stop()

    async def _serve(self) -> None:
        try:
            await self._uvicorn.serve()
        except SystemExit:
            raise DeviceError(
                f"cannot listen on {self._settings.host} port {self._settings.port}: the address is taken or not ours",
                remedy="Choose another --port or --host, or stop what listens there.",
            ) from None

    def _lengthen_backlog(self) -> None:
        for each in self._uvicorn.servers[0].sockets:
            # Only tuning: a system that does not take it keeps its own length.
            with contextlib.suppress(OSError), socket.fromfd(each.fileno(), each.family, each.type) as same:
                same.listen(_BACKLOG)

    def _port(self) -> int:
        port: int = self._uvicorn.servers[0].sockets[0].getsockname()[1]
        return port

    def stop(self) -> None:
        """Drain; called again: stop at once."""
        if self._stopping is None:
            self._stopping = asyncio.get_running_loop().create_task(self._stop())
        else:
            self._hurry.set()

    async def _stop(self) -> None:
        self.service.draining = True
        _log.info("draining: %d requests are running", self.app.open)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_seconds):
                while self.app.open and not self._hurry.is_set():
                    await asyncio.sleep(0.02)
        if self.app.open:
            _log.warning("aborting %d requests", self.app.open)
            # Its streams end with an error event, as for any worker that is gone.
            await self.service.models.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ABORT_SECONDS):
                    while self.app.open:
                        await asyncio.sleep(0.02)
        self._uvicorn.config.timeout_graceful_shutdown = 1
        self._uvicorn.should_exit = True


def serve(
    settings: ServerSettings,
    served: Sequence[ServedModel],
    keys: Keys,
    started: Callable[[int], None],
    *,
    admin_keys: Keys = NO_KEYS,
    command: Sequence[str] = WORKER_COMMAND,
) -> None:
    """Serve in this process until a signal ends it. Raises what `Server.run` raises."""
    os.umask(0o077)
    asyncio.run(_until_signalled(settings, served, keys, admin_keys, command, started))


async def _until_signalled(
    settings: ServerSettings,
    served: Sequence[ServedModel],
    keys: Keys,
    admin_keys: Keys,
    command: Sequence[str],
    started: Callable[[int], None],
) -> None:
    server = Server(settings, served, keys, admin_keys=admin_keys, command=command)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(number, server.stop)
        except NotImplementedError:  # Windows' loops have no such thing
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(server.stop))
    await server.run(started)
