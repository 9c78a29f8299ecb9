"""The models by name: loaded when asked for, shared, unloaded when idle or in the way, restarted when they crash.

Asynchronous, on the front's loop. One load at a time, in the order asked. A model that answers someone is never
unloaded; among the idle ones the least recently used go first, and only as many as the bytes needed ask for.
Processes are `octavo.server.worker_link`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from octavo.errors import ModelNotFoundError, NotEnoughMemoryError, OctavoError
from octavo.frontend import Frontend
from octavo.output_filter import load_filter
from octavo.server import wire
from octavo.server.confined import ConfinedFrontend
from octavo.server.faults import HttpFault, unavailable
from octavo.server.logs import without_paths
from octavo.server.settings import LinkName
from octavo.server.worker_link import WORKER_COMMAND, WorkerLink
from octavo.settings import SamplingParams, Settings
from octavo.units import readable_bytes

State = Literal["unloaded", "loading", "ready", "restarting", "failed", "unloading", "closed"]

_TEND_SECONDS = 5.0
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0
_SUSPECT_SECONDS = 600.0
_MOST_SUSPECTS = 10_000
_CRASHES_TO_REFUSE = 2

_log = logging.getLogger("octavo.server")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as the command line names it."""

    name: str
    aliases: tuple[str, ...]
    settings: Settings
    sampling: SamplingParams
    """What holds where a request says nothing."""
    fallback: ServedModel | None = None
    """What answers under the same name where this one is missing or does not fit; announced."""


@dataclass(frozen=True, slots=True)
class Resident:
    """A loaded model, in use: `Models.use` gives it and counts who has it."""

    served: ServedModel
    link: WorkerLink
    confined: ConfinedFrontend
    ready: wire.Ready

    @property
    def frontend(self) -> Frontend:
        return self.confined.frontend

    async def close(self) -> None:
        """End the worker and the other children; its memory is back when this returns."""
        await asyncio.to_thread(self.confined.close)
        await self.link.close()


class _Entry:
    """One name's state. Only `Models` changes it."""

    def __init__(self, served: ServedModel) -> None:
        self.served = served
        self.state: State = "unloaded"
        self.resident: Resident | None = None
        self.loading: asyncio.Task[Resident] | None = None
        self.link: WorkerLink | None = None
        self.users = 0
        self.retiring = False
        """Someone waits for its room: who comes now waits behind them, or a busy model would never leave."""
        self.last_used = time.monotonic()
        self.answered = False
        """Whether the worker there is now has answered anybody: a crash is then no loop."""
        self.crashes_in_row = 0
        self.loads = 0
        self.error: OctavoError | None = None

    @property
    def bytes(self) -> int:
        return 0 if self.link is None else self.link.needed_bytes or 0


class Suspects:
    """Bodies that were being answered when a worker died. One that was there twice is refused for a while."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: OrderedDict[bytes, tuple[frozenset[int], float]] = OrderedDict()

    def blame(self, digest: bytes, worker: int) -> None:
        """`worker`: the process that died; sent to it again while it was dying, a body is no more suspect."""
        workers, since = self._seen.pop(digest, (frozenset[int](), 0.0))
        if self._clock() - since > _SUSPECT_SECONDS:
            workers = frozenset()
        self._seen[digest] = workers | {worker}, self._clock()
        while len(self._seen) > _MOST_SUSPECTS:
            self._seen.popitem(last=False)

    def check(self, digest: bytes) -> None:
        """Raises HttpFault for a body that was there at two crashes."""
        workers, since = self._seen.get(digest, (frozenset[int](), 0.0))
        if len(workers) >= _CRASHES_TO_REFUSE and self._clock() - since <= _SUSPECT_SECONDS:
            raise HttpFault(
                400,
                f"the model's worker died {len(workers)} times while answering this request: it is not tried "
                "again for now",
                "request_refused",
                retry=False,
            )


class Models:
    """All models this server may load. `start` once, `close` at the end."""

    def __init__(
        self,
        served: Sequence[ServedModel],
        *,
        memory_bytes: int = 0,
        idle_unload_seconds: float = 0,
        command: Sequence[str] = WORKER_COMMAND,
        worker_link: LinkName = "auto",
    ) -> None:
        filters = {each.settings.filter for first in served for each in _with_fallbacks(first)}
        self._filters = {name: None if name is None else load_filter(name) for name in filters}
        self._entries = {each.name: _Entry(each) for each in served}
        self._names = {alias: each.name for each in served for alias in (*each.aliases, each.name)}
        self._memory_bytes = memory_bytes
        self._idle_unload_seconds = idle_unload_seconds
        self._command = command
        self._worker_link = worker_link
        self._turn = asyncio.Lock()
        """Held by the load in progress; asyncio's lock is first come, first served."""
        self._changed = asyncio.Condition()
        """Notified when a model becomes idle or is gone."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False
        self.suspects = Suspects()
        self.restarts = 0
        self.evictions = 0

    # --- what there is -----------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def find(self, name: str | None) -> ServedModel:
        """The model of a name or alias; the first one for None. Raises HttpFault 404."""
        if name is None:
            return next(iter(self._entries.values())).served
        return self._entry(name).served

    def state(self, name: str) -> State:
        return self._entry(name).state

    def resident(self, name: str) -> Resident | None:
        return self._entry(name).resident

    def status(self) -> dict[str, Any]:
        """Each model's state, and how far its load is, for /ready."""
        return {name: self._status(entry) for name, entry in self._entries.items()}

    def is_ready(self) -> bool:
        """Whether there is a model that answers now, or none was asked for yet. One that cannot be loaded does not
        take the others' place behind a load balancer."""
        states = {entry.state for entry in self._entries.values()}
        return not self._closing and ("ready" in states or not states & {"loading", "restarting", "failed"})

    def _status(self, entry: _Entry) -> dict[str, Any]:
        found: dict[str, Any] = {"state": entry.state}
        if entry.state in ("loading", "restarting") and entry.link is not None and entry.link.progress:
            stage = entry.link.progress
            found["stage"] = stage.stage
            if stage.total_bytes:
                found["progress"] = round(min(1.0, stage.done_bytes / stage.total_bytes), 3)
        if entry.error is not None:
            found["code"] = entry.error.code
        return found

    def _entry(self, name: str) -> _Entry:
        real = self._names.get(name)
        if real is None:
            raise HttpFault(
                404,
                f"there is no model {name[:80]!r} here; /v1/models lists those there are",
                "model_not_found",
                param="model",
            )
        return self._entries[real]

    # --- using one ---------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def use(self, name: str, timeout_seconds: float) -> AsyncIterator[Resident]:
        """The model, loaded if need be, kept loaded while in use.

        Raises HttpFault: 404, 503 model_loading after the timeout; and what loading raised.
        """
        entry = self._entry(name)
        deadline = time.monotonic() + timeout_seconds
        while entry.resident is None or entry.retiring or entry.state != "ready":
            await self._wait_for_load(entry, timeout_seconds, deadline)
        entry.users += 1
        resident = entry.resident
        try:
            yield resident
            entry.answered = entry.answered or entry.resident is resident
        finally:
            entry.users -= 1
            entry.last_used = time.monotonic()
            if entry.users == 0:
                self._notify()

    async def _wait_for_load(self, entry: _Entry, timeout_seconds: float, deadline: float) -> None:
        try:
            # Shielded: who gives up waiting does not end a load that others wait for too.
            async with asyncio.timeout(deadline - time.monotonic()):
                await asyncio.shield(self._load_task(entry))
        except TimeoutError:
            raise unavailable(
                f"{entry.served.name} is still {entry.state}; it was waited for {timeout_seconds:g} s",
                "model_loading",
                10,
            ) from None

    def _load_task(self, entry: _Entry) -> asyncio.Task[Resident]:
        if self._closing:
            raise unavailable("the server is shutting down", "shutting_down", 10)
        if entry.loading is None or entry.loading.done():
            entry.loading = self._spawn(self._load(entry))
            entry.loading.add_done_callback(_seen)
        return entry.loading

    def start(self, *, preload: bool) -> asyncio.Task[Resident] | None:
        """Look after idle models, and load the first in the background: the load, where there is one."""
        self._spawn(self._tend())
        if self._idle_unload_seconds:
            self._spawn(self._unload_idle())
        return self._load_task(next(iter(self._entries.values()))) if preload else None

    async def close(self) -> None:
        """End every worker; what they run ends with error events."""
        self._closing = True
        links = [entry.link for entry in self._entries.values() if entry.link is not None]
        await asyncio.gather(*(link.close() for link in links))
        residents = [entry.resident for entry in self._entries.values() if entry.resident is not None]
        await asyncio.gather(*(asyncio.to_thread(each.confined.close) for each in residents))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for entry in self._entries.values():
            entry.state, entry.resident = "closed", None

    async def unload(self, name: str) -> None:
        """Give an idle model's memory back. Raises HttpFault 409 where it is in use."""
        entry = self._entry(name)
        async with self._turn:
            if entry.users:
                raise HttpFault(
                    409, f"{entry.served.name} is answering {entry.users} requests", "model_busy", retry=False
                )
            if entry.resident is not None and entry.state == "ready":
                await self._unload(entry)

    # --- loading and unloading -----------------------------------------------------------------------------

    async def _load(self, entry: _Entry) -> Resident:
        await self._pause(entry)
        try:
            async with self._turn:
                if entry.resident is not None:  # whoever wanted its room has it, or gave up
                    return entry.resident
                if entry.state != "restarting":
                    entry.state = "loading"
                entry.error = None
                resident = await self._load_or_fall_back(entry)
        except OctavoError as error:
            entry.state, entry.error, entry.link = "failed", error, None
            _log.warning(
                "model %s: loading failed (%s): %s", entry.served.name, error.code, without_paths(str(error))
            )
            raise
        except BaseException:
            if entry.resident is None:
                entry.state = "unloaded"
            raise
        entry.resident, entry.state, entry.answered = resident, "ready", False
        entry.last_used = time.monotonic()
        entry.loads += 1
        self._spawn(self._watch(entry, resident))
        _log.info("model %s: ready, worker %s", entry.served.name, resident.link.pid)
        for notice in resident.ready.notices:
            _log.warning("model %s: %s", entry.served.name, without_paths(notice))
        return resident

    async def _pause(self, entry: _Entry) -> None:
        if entry.crashes_in_row > 1:
            await asyncio.sleep(
                min(_FIRST_PAUSE_SECONDS * 2 ** (entry.crashes_in_row - 2), _LONGEST_PAUSE_SECONDS)
            )

    async def _load_or_fall_back(self, entry: _Entry) -> Resident:
        """The model, or the first of its fallbacks that can be loaded, with a notice."""
        notices: tuple[str, ...] = ()
        served = entry.served
        while True:
            try:
                resident = await self._load_making_room(entry, served)
            except (ModelNotFoundError, NotEnoughMemoryError) as error:
                if served.fallback is None:
                    raise
                instead = served.fallback.settings.model
                notices += (f"{error.message}: the fallback {instead} answers in its place",)
                served = served.fallback
            else:
                every = (*notices, *resident.ready.notices)
                return dataclasses.replace(resident, ready=dataclasses.replace(resident.ready, notices=every))

    async def _load_making_room(self, entry: _Entry, served: ServedModel) -> Resident:
        while True:
            try:
                return await self._load_once(entry, served)
            except NotEnoughMemoryError as error:
                # What the machine has is known only to the worker's plan; make room for what is missing.
                missing = error.needed_bytes - error.available_bytes
                taken = self._taken_beside(entry)
                if not 0 < missing <= taken:
                    raise
                await self._shrink(entry, taken - missing)

    async def _load_once(self, entry: _Entry, served: ServedModel) -> Resident:
        async def make_room(needed_bytes: int) -> None:
            if self._memory_bytes:
                await self._fit(entry, needed_bytes)

        link = entry.link = WorkerLink(make_room, self._command, self._worker_link)
        try:
            ready = await link.load(_plain_settings(served.settings))
            confined = ConfinedFrontend(ready, self._filters[served.settings.filter], self._worker_link)
            try:
                await asyncio.to_thread(confined.build)
            except BaseException:
                await asyncio.to_thread(confined.close)
                raise
            link.end_with(confined.frontend.stop_token_ids)
        except BaseException:
            link.kill()
            await link.close()
            raise
        return Resident(served, link, confined, ready)

    async def _fit(self, entry: _Entry, needed_bytes: int) -> None:
        """Make room within `memory_bytes`."""
        if needed_bytes > self._memory_bytes:
            raise NotEnoughMemoryError(
                f"{entry.served.name} needs {readable_bytes(needed_bytes)}; all models together may take "
                f"{readable_bytes(self._memory_bytes)}",
                remedy="Raise --memory-bytes, or lower --context or --max-sequences.",
                needed_bytes=needed_bytes,
                available_bytes=self._memory_bytes,
            )
        await self._shrink(entry, self._memory_bytes - needed_bytes)

    def _beside(self, entry: _Entry) -> list[_Entry]:
        return [
            other for other in self._entries.values() if other is not entry and other.resident is not None
        ]

    def _taken_beside(self, entry: _Entry) -> int:
        return sum(other.bytes for other in self._beside(entry))

    async def _shrink(self, entry: _Entry, most_bytes: int) -> None:
        """Unload until the models beside `entry` take at most this: idle ones, the longest unused first.

        Where all are busy, one of them is closed to newcomers and waited for.
        """
        victim: _Entry | None = None
        try:
            while self._taken_beside(entry) > most_bytes:
                others = self._beside(entry)
                idle = [other for other in others if other.users == 0]
                if idle:
                    self.evictions += 1
                    await self._unload(min(idle, key=lambda other: (not other.retiring, other.last_used)))
                elif victim in others:
                    await self._wait_for_change()
                else:
                    victim = min(others, key=lambda other: other.last_used)
                    victim.retiring = True
        finally:
            if victim is not None:
                victim.retiring = False

    async def _wait_for_change(self) -> None:
        """Or a moment, since a change may have come before this waits."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2), self._changed:
                await self._changed.wait()

    async def _unload(self, entry: _Entry) -> None:
        assert entry.users == 0
        resident, entry.resident, entry.state = entry.resident, None, "unloading"
        assert resident is not None
        _log.info("model %s: unloaded", entry.served.name)
        closing = self._spawn(self._close_unloaded(entry, resident))
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError:
            # Who gives the turn to the next load must not do so before this memory is back.
            await closing
            raise

    async def _close_unloaded(self, entry: _Entry, resident: Resident) -> None:
        await resident.close()
        if entry.link is resident.link:
            entry.link = None
        if entry.state == "unloading":
            entry.state = "unloaded"
        self._notify()

    async def _tend(self) -> None:
        """What can wait: surplus children, and a child for the first grammar where a model is idle."""
        while True:
            await asyncio.sleep(_TEND_SECONDS)
            for entry in list(self._entries.values()):
                if entry.resident is not None:
                    await asyncio.to_thread(entry.resident.confined.tend, idle=entry.users == 0)

    async def _unload_idle(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._idle_unload_seconds / 4))
            async with self._turn:
                for entry in self._entries.values():
                    idle = entry.resident is not None and entry.users == 0 and entry.state == "ready"
                    if idle and time.monotonic() - entry.last_used > self._idle_unload_seconds:
                        await self._unload(entry)

    # --- crashes -------------------------------------------------------------------------------------------

    async def _watch(self, entry: _Entry, resident: Resident) -> None:
        """Restart a worker that ended without being told to."""
        await resident.link.ended.wait()
        if self._closing or entry.resident is not resident:
            return
        entry.resident, entry.state = None, "restarting"
        entry.crashes_in_row = 1 if entry.answered else entry.crashes_in_row + 1
        self.restarts += 1
        _log.error("model %s: its worker ended (%s); restarting", entry.served.name, resident.link.reason)
        self._notify()
        # The process may still be closing: its memory must be back before the next one plans.
        resident.link.kill()
        await resident.close()
        with contextlib.suppress(HttpFault):
            self._load_task(entry)

    # --- small things --------------------------------------------------------------------------------------

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _notify(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        self._spawn(notify())


def _with_fallbacks(served: ServedModel) -> Iterator[ServedModel]:
    each: ServedModel | None = served
    while each is not None:
        yield each
        each = each.fallback


def _seen(task: asyncio.Task[Resident]) -> None:
    """A load nobody waits for any more has its error in the entry's state."""
    if not task.cancelled():
        task.exception()


def _plain_settings(settings: Settings) -> Mapping[str, Any]:
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in (
            (each.name, getattr(settings, each.name)) for each in dataclasses.fields(settings)
        )
        if value is not None and name != "filter"
    }
