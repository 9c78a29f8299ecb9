"""Children that wait for questions: one is asked, answers within its limits or is killed, and another takes its place.

For what a stranger's text can make take for ever or all memory: rendering a checkpoint's own template, compiling a
grammar. Synchronous and thread-safe. What is asked and answered is `octavo.server.wire`'s, the limits that a child
sets itself are `octavo.server.child`'s.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence

from octavo.errors import ClosedError, DeviceError, OctavoError
from octavo.server import sandbox, wire
from octavo.server.settings import LinkName

_SET_UP_SECONDS = 120.0
_IDLE_SECONDS = 60.0
"""After so long without a question `trim` ends a child."""

_log = logging.getLogger("octavo.server")


class ChildLostError(Exception):
    """A child did not answer. `reason` is fit for who asked: what the question did, not where."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class NoChildError(OctavoError):
    """There was no child to ask. Says nothing of the question: asked later, it may well be answered."""

    code = "no_child"


class WarmChildren:
    """Children of one command, each set up with the same first message. The first starts with the first question,
    or with `warm`; more while all are busy, up to `most`. `close` ends them."""

    def __init__(
        self,
        command: Sequence[str],
        set_up: wire.ToChild,
        *,
        seconds: float,
        most: int,
        link: LinkName = "auto",
    ) -> None:
        """`seconds`: on the clock, for one answer; a child's own limit of computing time is well below."""
        self._command = command
        self._set_up = wire.encode(set_up)
        self._seconds = seconds
        self._most = most
        self._link = link
        self._free = threading.Condition()
        """Guards what follows; notified when a child may be taken or started."""
        self._idle: list[_WarmChild] = []
        """The one used last at the end, from where they are taken."""
        self._alive: set[_WarmChild] = set()
        self._starting = 0
        self._setting_up: set[_WarmChild] = set()
        """Of those that start: `close` does not wait for them."""
        self._closed = False
        self.killed = 0
        """Children that ended without an answer."""

    def warm(self) -> None:
        """Start and set up a child, where none is idle. Raises ChildLostError, and what else `ask` raises."""
        self._give_back(self._take())

    def ask(self, question: wire.ToChild) -> wire.FromChild:
        """Raises ChildLostError where the question was too much, NoChildError where no child was free in `seconds`
        or could be started, ClosedError after `close`, WireError for one that cannot be sent, and the error of a
        set-up that was refused."""
        frame = wire.encode(question)
        try:
            child = self._take()
        except ChildLostError as lost:
            raise NoChildError(
                f"a child process was needed, and there is none: {lost.reason}", remedy="Try again."
            ) from None
        try:
            answer = child.ask(frame, self._seconds)
        except (OSError, EOFError, wire.WireError) as error:
            reason = child.why(error)
            self._lose(child)
            if self._closed:
                raise ClosedError("the model was unloaded", remedy="Try again.") from None
            raise ChildLostError(reason) from None
        except BaseException:
            self._lose(child)
            raise
        self._give_back(child)
        return answer

    def trim(self) -> None:
        """End those that nobody asked for a while, but one."""
        with self._free:
            now = time.monotonic()
            surplus = [each for each in self._idle[:-1] if now - each.used_at > _IDLE_SECONDS]
            self._idle = [each for each in self._idle if each not in surplus]
            self._alive.difference_update(surplus)
        for child in surplus:
            child.end()

    def close(self) -> None:
        """End them all; whoever waits for an answer gets ClosedError."""
        with self._free:
            self._closed = True
            alive, self._alive = self._alive | self._setting_up, set()
            self._idle.clear()
            self._free.notify_all()
        for child in alive:
            child.end()

    def _take(self) -> _WarmChild:
        end = time.monotonic() + self._seconds
        with self._free:
            while True:
                if self._closed:
                    raise ClosedError("the model was unloaded", remedy="Try again.")
                while self._idle:
                    child = self._idle.pop()
                    if child.is_alive():
                        return child
                    self._alive.discard(child)
                    child.end()
                if len(self._alive) + self._starting < self._most:
                    self._starting += 1
                    break
                if not self._free.wait(max(0.0, end - time.monotonic())):
                    raise ChildLostError("too many others are asked at once")
        return self._start()

    def _start(self) -> _WarmChild:
        child: _WarmChild | None = None
        try:
            child = _WarmChild(self._command, self._link)
            with self._free:
                if self._closed:
                    raise ClosedError("the model was unloaded", remedy="Try again.")
                self._setting_up.add(child)
            said = child.ask(self._set_up, _SET_UP_SECONDS)
        except (OSError, EOFError, DeviceError, wire.WireError) as error:
            self._started(child, lost=True)
            if child is None:
                raise ChildLostError("it could not be started") from error
            reason = child.why(error)
            child.end()
            if self._closed:
                raise ClosedError("the model was unloaded", remedy="Try again.") from None
            raise ChildLostError(reason) from None
        except BaseException:
            self._started(child, lost=True)
            if child is not None:
                child.end()
            raise
        if isinstance(said, wire.Refused):
            self._started(child, lost=True)
            child.end()
            raise wire.error_from(said.fault)
        if not self._started(child):
            child.end()
            raise ClosedError("the model was unloaded", remedy="Try again.")
        return child

    def _started(self, child: _WarmChild | None, *, lost: bool = False) -> bool:
        """Whether it is still wanted."""
        with self._free:
            self._starting -= 1
            if child is not None:
                self._setting_up.discard(child)
                if not (lost or self._closed):
                    self._alive.add(child)
            self._free.notify()
            return not self._closed

    def _give_back(self, child: _WarmChild) -> None:
        child.used_at = time.monotonic()
        with self._free:
            if not self._closed:
                self._idle.append(child)
                self._free.notify()

    def _lose(self, child: _WarmChild) -> None:
        """End it, and let another be warm before the next question comes."""
        with self._free:
            was_ours = child in self._alive
            self._alive.discard(child)
            self._free.notify()
        child.end()
        if was_ours and not self._closed:
            self.killed += 1
            _log.warning("a child process ended while it was asked (%s)", self._command[-1])
            threading.Thread(target=self._warm_quietly, name="octavo-warm", daemon=True).start()

    def _warm_quietly(self) -> None:
        with contextlib.suppress(Exception):  # the next question starts one, and says what is wrong
            self.warm()


class _WarmChild:
    def __init__(self, command: Sequence[str], link: LinkName) -> None:
        self._child = sandbox.start(command, quiet=True, link=link)
        self.used_at = time.monotonic()

    def is_alive(self) -> bool:
        return self._child.process.poll() is None

    def ask(self, frame: bytes, seconds: float) -> wire.FromChild:
        """Raises OSError (TimeoutError), EOFError, WireError."""
        connection, end = self._child.connection, time.monotonic() + seconds
        connection.settimeout(seconds)
        connection.sendall(frame)
        head = _exactly(connection, wire.LENGTH_BYTES, end)
        answer = wire.decode(_exactly(connection, wire.frame_length(head), end))
        if not isinstance(answer, wire.FromChild):
            raise wire.WireError(f"a child does not send {type(answer).__name__}")
        return answer

    def why(self, error: Exception) -> str:
        """What became of it, in words for who asked."""
        code = None
        if isinstance(error, EOFError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._child.process.wait(1)
        if isinstance(error, TimeoutError) or (code is not None and code == -getattr(signal, "SIGPROF", 0)):
            return "it takes more time than it may"
        return "it ends the process that it is given to"

    def end(self) -> None:
        self._child.kill()
        self._child.connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.process.wait(5)


def _exactly(connection: socket.socket, count: int, end: float) -> bytes:
    found = bytearray()
    while len(found) < count:
        connection.settimeout(max(0.001, end - time.monotonic()))
        if not (more := connection.recv(min(count - len(found), 1 << 20))):
            raise EOFError
        found += more
    return bytes(found)
