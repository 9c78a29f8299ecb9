"""Is there room for a download? Asked before it starts, so that it fails at once and with both numbers.

Another process may still take the room: a full disk is the same error, later.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from octavo.errors import NotEnoughDiskError
from octavo.units import readable_bytes


def require_space(folder: Path, needed_bytes: int, what: str, *, setting: str) -> None:
    """Raise NotEnoughDiskError unless `needed_bytes` are free where `folder` is, or will be made.

    `setting` names what moves the folder elsewhere.
    """
    error = not_enough_space(folder, needed_bytes, what, setting=setting)
    if error.available_bytes < needed_bytes:
        raise error


def not_enough_space(folder: Path, needed_bytes: int, what: str, *, setting: str) -> NotEnoughDiskError:
    """The error to raise where a write found the disk full."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free_bytes = shutil.disk_usage(existing).free
    return NotEnoughDiskError(
        f"{what} needs {readable_bytes(needed_bytes)} in {folder}, where {readable_bytes(free_bytes)} are free",
        remedy=f"Free some space, or set {setting} to a folder on another disk.",
        needed_bytes=needed_bytes,
        available_bytes=free_bytes,
    )


def is_full(error: Exception) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
