"""An advisory lock that is only an optimization: whoever cannot have it must be right without it.

POSIX flock: the kernel lets go when its holder dies, however it dies. Some network file systems and Windows
have none. The lock's file exists only while somebody holds it, or died holding it.
"""

from __future__ import annotations

import enum
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL_SECONDS = 0.05


class Lock(enum.Enum):
    HELD = "held"
    BUSY = "busy"
    """Somebody else holds it."""
    UNSUPPORTED = "unsupported"
    """This file system or platform has no locks."""


@contextmanager
def locked(
    path: Path, *, wait_seconds: float = 0.0, waiting: Callable[[], None] | None = None
) -> Iterator[Lock]:
    """Hold the lock at `path` for the block, waiting at most `wait_seconds`; says whether it is held.

    `waiting` is called once, where it has to wait.
    """
    deadline = time.monotonic() + wait_seconds
    state, descriptor = _try_lock(path)
    if state is Lock.BUSY and waiting is not None:
        waiting()
    while state is Lock.BUSY and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        state, descriptor = _try_lock(path)
    try:
        yield state
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)
            os.close(descriptor)


if sys.platform == "win32":

    def _try_lock(path: Path) -> tuple[Lock, int | None]:
        return Lock.UNSUPPORTED, None

else:
    import fcntl

    def _try_lock(path: Path) -> tuple[Lock, int | None]:
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return Lock.BUSY, None
            except OSError:
                os.close(descriptor)
                path.unlink(missing_ok=True)
                return Lock.UNSUPPORTED, None
            # The last holder may have removed the file between our open and our lock.
            if _is_still_at(descriptor, path):
                return Lock.HELD, descriptor
            os.close(descriptor)

    def _is_still_at(descriptor: int, path: Path) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), path.stat())
        except FileNotFoundError:
            return False
