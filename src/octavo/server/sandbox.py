"""Every child process of the server: started here with its caps, killed here, and gone when the server is.

A child gets its end of `octavo.server.link` and nothing else: no other descriptor, on standard input at most the
token of a loopback link, and an environment without the server's secrets. It ends by itself when the other end
closes, so also when the server is killed.
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

from octavo.server.link import offer
from octavo.server.settings import LinkName

_SECRETS = ("OCTAVO_API_KEY", "OCTAVO_ADMIN_KEY")
"""Variables that are the server's alone."""
_HUB_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")
"""Those of who downloads: workers, and no child that runs a stranger's text."""
_GRACE_SECONDS = 5.0
_CAPPED = ("-m", "octavo.server.capped")
"""Caps the new process, then becomes the command: preexec_fn is not safe in a program with threads."""


@dataclass(frozen=True, slots=True)
class Caps:
    """Of a whole process; 0: no limit but the machine's. What one question to a warm child may cost is
    `octavo.server.child`'s."""

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
        if self.process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.name == "posix":
                os.killpg(self.process.pid, 9)
            else:
                self.process.kill()

    async def end(self, grace_seconds: float = _GRACE_SECONDS) -> None:
        """Wait for it to end by itself, then kill it."""
        try:
            async with asyncio.timeout(grace_seconds):
                await self.wait()
        except TimeoutError:
            self.kill()
            await self.wait()


def start(
    command: Sequence[str], caps: Caps = NO_CAPS, *, quiet: bool = False, link: LinkName = "auto"
) -> Child:
    """Start `command`, a Python module or script and its arguments, with what `link.connect` takes as the last one.

    `quiet`: for children that run a stranger's text: no standard error, and no token of the hub.
    Raises OSError where the system cannot start it, DeviceError where it does not connect. Blocks.
    """
    place = offer(link)
    process: subprocess.Popen[bytes] | None = None
    try:
        process = subprocess.Popen(
            [sys.executable, *_wrapping(caps), *command, place.argument],
            stdin=place.standard_input,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if quiet else None,
            pass_fds=place.descriptors,
            env=_environment(os.environ, (*_SECRETS, *_HUB_SECRETS) if quiet else _SECRETS),
            start_new_session=True,  # a group of its own: Ctrl-C is the server's, and `kill` reaches all of it
        )
        return Child(process, place.accept(process))
    except BaseException:
        if process is not None:
            process.kill()
            process.wait()
        raise
    finally:
        place.close()


def _wrapping(caps: Caps) -> tuple[str, ...]:
    """Windows has no resource limits: a child there is only ever killed."""
    if os.name != "posix":
        return ()
    return (*_CAPPED, str(caps.memory_bytes), str(caps.cpu_seconds))


def _environment(environment: Mapping[str, str], without: Sequence[str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in without}


async def _wait(process: subprocess.Popen[bytes]) -> int:
    """Poll rather than block a thread of the pool: there may be many children and they live long."""
    pause = 0.005
    while (code := process.poll()) is None:
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, 0.1)
    return code
