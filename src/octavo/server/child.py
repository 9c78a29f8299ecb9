"""A warm child's side: one question after the other, each with a limit of computing time that the system enforces.

The first message sets it up; then its address space is capped at what it has by then and what a question may take
more. A question that computes too long is no exception that could be caught: the process ends there, and
`octavo.server.warm_children` starts another. Where there are no resource limits (Windows) only the other end's clock
holds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.errors import OctavoError
from octavo.server import wire
from octavo.server.link import connect

Answer = Callable[[Any], wire.FromChild]
"""A question -> its answer. Raises OctavoError, which goes back as `wire.Refused`."""


@dataclass(frozen=True, slots=True)
class QuestionCaps:
    """Of one question."""

    memory_bytes: int
    """Address space beyond what the child has when it is set up."""
    cpu_seconds: float


def serve(
    argument: str,
    caps: QuestionCaps,
    set_up: Callable[[Any], Answer],
    *,
    decode: Callable[[bytes], Any] = wire.decode,
) -> None:
    """Answer until the other end closes. `set_up` gets the first message and gives what answers the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front's: it drains
    with connect(argument) as link, link.makefile("rb") as reader:
        answer: Answer | None = None
        while (question := _next(reader, decode)) is not None:
            try:
                if answer is None:
                    with _limited(caps.cpu_seconds * _SET_UP_SHARE):
                        answer = set_up(question)
                    _cap_memory(caps.memory_bytes)
                    said: wire.FromChild = wire.Done()
                else:
                    with _limited(caps.cpu_seconds):
                        said = answer(question)
            except (OctavoError, MemoryError, RecursionError) as error:
                said = wire.Refused(wire.fault_of(_ours(error)))
            _send(link, said)


_SET_UP_SHARE = 20
"""Reading a vocabulary takes seconds on a slow machine; so may compiling the template of a hostile model, once."""


def _ours(error: Exception) -> Exception:
    if isinstance(error, OctavoError):
        return error
    what = "memory" if isinstance(error, MemoryError) else "depth"
    return OctavoError(f"it takes more {what} than it may", remedy="Simplify it.")


def _next(reader: Any, decode: Callable[[bytes], Any]) -> Any:
    head = reader.read(wire.LENGTH_BYTES)
    if len(head) < wire.LENGTH_BYTES:
        return None
    length = wire.frame_length(head)
    body = reader.read(length)
    return decode(body) if len(body) == length else None


def _send(link: socket.socket, said: wire.FromChild) -> None:
    with contextlib.suppress(OSError):  # the other end has gone: the next read says so too
        link.sendall(wire.encode(said))


@contextlib.contextmanager
def _limited(cpu_seconds: float) -> Any:
    """SIGPROF ends a process that has no handler for it, also within a single step of the interpreter."""
    if os.name != "posix":
        yield
        return
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _cap_memory(more_bytes: int) -> None:
    """Linux alone says how much address space there is, and holds a process to a limit of it."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except OSError:
        return
    import resource

    most = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
