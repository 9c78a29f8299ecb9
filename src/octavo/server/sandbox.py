"""Every child process of the server: started here with its caps, killed here, and gone when the server is.

A child inherits one end of a socket pair and nothing else: no other descriptor, no standard input, and an
environment without secrets. It ends by itself when the other end closes, so also when the server is killed.
Where there are no socket pairs to inherit (Windows) nothing can be started; `octavo serve` says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from octavo.errors import DeviceError

_SECRETS = ("OCTAVO_API_KEY", "OCTAVO_ADMIN_KEY")
"""Variables that are the server's alone."""
_GRACE_SECONDS = 5.0
_CAPPED = ("-m", "octavo.server.capped")
"""Caps the new process, then becomes the command: preexec_fn is not safe in a program with threads."""


@dataclass(frozen=True, slots=True)
class Caps:
    """0: no limit but the machine's."""

    memory_bytes: int = 0
    """Address space: only for children that map no model."""
    cpu_seconds: int = 0


NO_CAPS = Caps()
"""A child still writes no core file, which would hold what users wrote."""


@dataclass(slots=True)
class Child:
    """A running child and our end of its socket. `connection` is the caller's to close or hand on."""

    process: subprocess.Popen[bytes]
    connection: socket.socket
    _waiting: asyncio.Task[int] | None = field(default=None, repr=False)

    @property
    def pid(self) -> int:
        return self.process.pid

    async def wait(self) -> int:
        """Its exit code, when it has ended; negative: the signal that ended it. Callers share one wait."""
        if self._waiting is None:
            self._waiting = asyncio.create_task(_wait(self.process))
        return await asyncio.shield(self._waiting)

    def kill(self) -> None:
        """End it and whatever it started, now. No effect on one that has ended."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, 9)

    async def end(self, grace_seconds: float = _GRACE_SECONDS) -> None:
        """Wait for it to end by itself, then kill it."""
        try:
            async with asyncio.timeout(grace_seconds):
                await self.wait()
        except TimeoutError:
            self.kill()
            await self.wait()


def start(command: Sequence[str], caps: Caps = NO_CAPS, *, quiet: bool = False) -> Child:
    """Start `command`, a Python module or script and its arguments, with the socket's number as the last one.

    Raises OSError where the system cannot start it, DeviceError where it has no way to.
    """
    if os.name != "posix":
        raise DeviceError(
            "octavo serve needs a POSIX system: its workers inherit a socket",
            remedy="Run it on Linux, macOS or in WSL.",
        )
    ours, theirs = socket.socketpair()
    try:
        process = subprocess.Popen(
            [
                sys.executable,
                *_CAPPED,
                str(caps.memory_bytes),
                str(caps.cpu_seconds),
                *command,
                str(theirs.fileno()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if quiet else None,
            pass_fds=(theirs.fileno(),),
            env=_environment(os.environ),
            start_new_session=True,  # a group of its own: Ctrl-C is the server's, and `kill` reaches all of it
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return Child(process, ours)


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in _SECRETS}


async def _wait(process: subprocess.Popen[bytes]) -> int:
    """Poll rather than block a thread of the pool: there may be many children and they live long."""
    pause = 0.005
    while (code := process.poll()) is None:
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, 0.1)
    return code
