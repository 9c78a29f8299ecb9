"""Opening what a checkpoint names: regular files only, bounded reads, read-only maps.

A FIFO would block for ever and a device may act on being opened, so neither is. What the bytes mean is the
readers' work (gguf.py, safetensors.py, documents.py).
"""

from __future__ import annotations

import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from octavo.errors import ModelFormatError, ModelNotFoundError, UnsafeFileError

FETCH_AGAIN = "Fetch the model again; if the error stays, the copy it comes from is damaged."

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: Path) -> tuple[int, os.stat_result]:
    """An open descriptor of a regular file, and its status.

    Raises UnsafeFileError for anything else and ModelNotFoundError where the file cannot be opened.
    """
    flags = os.O_RDONLY
    for name in ("O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY"):
        flags |= getattr(os, name, 0)
    try:
        _require_regular(path, os.stat(path))
        descriptor = os.open(path, flags)
        try:
            status = os.fstat(descriptor)
            _require_regular(path, status)  # again: what stands there may have changed since
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        raise _unreadable(path, error) from error
    return descriptor, status


def _unreadable(path: Path, error: OSError) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"cannot read {path}: {error.strerror}", remedy="Check the path, its permissions and the disk."
    )


def _require_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in _KINDS if test(status.st_mode)), "something else")
        raise UnsafeFileError(
            f"{path} is {kind}, not a file", remedy="Replace it by the model's own file, or remove it."
        )


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """The whole of a file that must not be larger than `limit_bytes` (ModelFormatError)."""
    descriptor, _ = open_regular(path)
    try:
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(data) > limit_bytes:
        raise ModelFormatError(
            f"{path} is larger than {limit_bytes:,} bytes, the most such a file may have", remedy=FETCH_AGAIN
        )
    return data


@dataclass(frozen=True, slots=True)
class MappedFile:
    """A regular file, mapped read-only. Callers check their offsets against `size_bytes` first."""

    path: Path
    status: os.stat_result
    data: mmap.mmap

    @property
    def size_bytes(self) -> int:
        return self.status.st_size

    @classmethod
    def open(cls, path: Path) -> MappedFile:
        """Raises as `open_regular`; ModelFormatError for an empty file."""
        descriptor, status = open_regular(path)
        try:
            if status.st_size == 0:
                raise ModelFormatError(f"{path} is empty", remedy=FETCH_AGAIN)
            return cls(path, status, mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ))
        except OSError as error:
            raise _unreadable(path, error) from error
        finally:
            os.close(descriptor)

    def array(self, offset: int, nbytes: int, dtype: np.dtype[Any]) -> np.ndarray:
        """`nbytes` at `offset` as a flat read-only array over the map; nothing is copied.

        Raises ModelFormatError where the file was written to since it was opened: its header and fingerprint
        no longer hold, and touching pages past a new end would kill the process.
        """
        self._require_unchanged()
        return np.frombuffer(self.data, dtype, nbytes // dtype.itemsize, offset)

    def _require_unchanged(self) -> None:
        try:
            now = os.stat(self.path)
        except OSError:
            return  # unlinked: the map still holds what was opened
        opened = self.status
        same = os.path.samestat(now, opened)
        if same and (now.st_size, now.st_mtime_ns) != (opened.st_size, opened.st_mtime_ns):
            raise ModelFormatError(
                f"{self.path} was written to while it was being read",
                remedy="Start again when the copy or download has finished.",
            )
