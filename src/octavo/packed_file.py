"""One file of packed arrays: written front to back as they come, mapped back once every byte is verified.

It is a safetensors file any reader can open: arrays start at multiples of 64 bytes (padding is arrays of its
own, since the format allows no holes), and the header, known only at the end, gets its room beforehand.
Names, places and lifetimes of such files are `octavo.packed_cache`'s work.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

ALIGNMENT_BYTES = 64

_WRITE_BYTES = 1 << 22
_PADDING = "__padding__"
_PAGE_BYTES = 4096
_HEADER_BYTES_AN_ARRAY = 384
"""For its entry and that of padding before it."""
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "I8": np.dtype("<i1"),
    "U8": np.dtype("<u1"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def array_bytes(array: np.ndarray) -> memoryview:
    """The bytes an array is stored as: row-major, flat."""
    flat: memoryview = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return flat


def write_all(descriptor: int, data: memoryview) -> None:
    """One system call may write less than it was given."""
    while data:
        data = data[os.write(descriptor, data) :]


class DamagedFileError(Exception):
    """The file is not what its description says. Never shown to a user: the entry is made again."""


@dataclass(frozen=True, slots=True)
class StoredArray:
    """Where an array lies in the file, and the SHA-256 of its bytes."""

    name: str
    dtype: str
    """As safetensors names it: I8, F16, ..."""
    shape: tuple[int, ...]
    offset: int
    """From the start of the file, in bytes."""
    sha256: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * _DTYPES[self.dtype].itemsize

    @property
    def is_padding(self) -> bool:
        return self.name.startswith(_PADDING)


@dataclass(frozen=True, slots=True)
class FileContents:
    """All of a file, in order: `header_bytes` of header, then the arrays without a hole."""

    header_bytes: int
    header_sha256: str
    arrays: tuple[StoredArray, ...]

    @property
    def nbytes(self) -> int:
        return self.header_bytes + sum(array.nbytes for array in self.arrays)


def header_bytes(arrays: int) -> int:
    """The room a file keeps for the header of at most this many arrays."""
    return (1 + -(-arrays * _HEADER_BYTES_AN_ARRAY // _PAGE_BYTES)) * _PAGE_BYTES


class PackedFileWriter:
    """Writes arrays to an empty file open for writing; `finish` writes the header. OSErrors pass through.

    `arrays` is an upper bound on how many will come, for the header's room.
    """

    def __init__(self, descriptor: int, arrays: int) -> None:
        self._descriptor = descriptor
        self._header_bytes = header_bytes(arrays)
        self._end = self._header_bytes
        self._arrays: list[StoredArray] = []
        os.lseek(descriptor, self._end, os.SEEK_SET)

    def append(self, name: str, array: np.ndarray) -> StoredArray:
        gap = -self._end % ALIGNMENT_BYTES
        if gap:
            self._write(f"{_PADDING}.{len(self._arrays)}", np.zeros(gap, np.uint8))
        return self._write(name, array)

    def finish(self) -> FileContents:
        header = json.dumps(
            {
                array.name: {
                    "dtype": array.dtype,
                    "shape": array.shape,
                    "data_offsets": [
                        array.offset - self._header_bytes,
                        array.offset - self._header_bytes + array.nbytes,
                    ],
                }
                for array in self._arrays
            },
            separators=(",", ":"),
        ).encode()
        room = self._header_bytes - 8
        assert len(header) <= room, "a layout made more or longer-named arrays than it announced"
        block = room.to_bytes(8, "little") + header.ljust(room)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        write_all(self._descriptor, memoryview(block))
        return FileContents(self._header_bytes, hashlib.sha256(block).hexdigest(), tuple(self._arrays))

    def _write(self, name: str, array: np.ndarray) -> StoredArray:
        dtype, data = _DTYPE_NAMES[array.dtype], array_bytes(array)
        digest = hashlib.sha256()
        for first in range(0, len(data), _WRITE_BYTES):
            part = data[first : first + _WRITE_BYTES]
            digest.update(part)
            write_all(self._descriptor, part)
        stored = StoredArray(name, dtype, array.shape, self._end, digest.hexdigest())
        self._arrays.append(stored)
        self._end += stored.nbytes
        return stored


class PackedFile:
    """A verified file in memory: `arrays` by name, read-only, backed by the file's pages."""

    def __init__(self, mapping: mmap.mmap, contents: FileContents) -> None:
        self._mapping = mapping
        self._places = {array.name: array for array in contents.arrays}
        self.arrays = {array.name: _view(mapping, array) for array in contents.arrays if not array.is_padding}

    def drop_pages(self, names: Sequence[str]) -> None:
        """Give back the memory of these arrays; touching them reads the file again. No effect on Windows."""
        if not hasattr(self._mapping, "madvise"):
            return
        for name in names:
            place = self._places[name]
            # Only pages that belong to this array alone.
            first = -(-place.offset // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (place.offset + place.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                self._mapping.madvise(mmap.MADV_DONTNEED, first, last - first)

    def close(self) -> None:
        """Unmap now, or with the last array somebody still holds."""
        self.arrays.clear()
        with suppress(BufferError):
            self._mapping.close()


def map_packed_file(
    path: Path, contents: FileContents, progress: Callable[[int], None] | None = None
) -> PackedFile:
    """Map the file at `path` after checking its size and every byte's hash, on all cores.

    `progress` is called with the bytes verified so far. Raises DamagedFileError, or OSError where the file
    cannot be opened.
    """
    _require_no_holes(path, contents)
    with path.open("rb") as file:
        actual = os.fstat(file.fileno()).st_size
        if actual != contents.nbytes:
            raise DamagedFileError(f"{path.name} has {actual} bytes instead of {contents.nbytes}")
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        _verify(mapping, contents, progress)
    except BaseException:
        with suppress(BufferError):  # Ctrl-C may leave a thread that still reads: it unmaps with its view
            mapping.close()
        raise
    return PackedFile(mapping, contents)


def _require_no_holes(path: Path, contents: FileContents) -> None:
    """So that hashing the parts covers every byte, and no view reaches outside the file."""
    end = contents.header_bytes
    for array in contents.arrays:
        if array.dtype not in _DTYPES or array.offset != end or any(size < 0 for size in array.shape):
            raise DamagedFileError(f"{path.name}: {array.name} cannot be at byte {array.offset}")
        end += array.nbytes


def _verify(mapping: mmap.mmap, contents: FileContents, progress: Callable[[int], None] | None) -> None:
    parts = [(0, contents.header_bytes, contents.header_sha256)]
    parts += [(array.offset, array.nbytes, array.sha256) for array in contents.arrays]
    parts.sort(key=lambda part: part[1], reverse=True)  # the largest first, so that all cores end together

    def is_intact(part: tuple[int, int, str]) -> bool:
        offset, nbytes, expected = part
        with memoryview(mapping) as whole, whole[offset : offset + nbytes] as bytes_:
            return hashlib.sha256(bytes_).hexdigest() == expected

    done = 0
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1), "octavo-verify") as pool:
        for part, intact in zip(parts, pool.map(is_intact, parts), strict=True):
            if not intact:
                raise DamagedFileError(f"bytes {part[0]} to {part[0] + part[1]} are not what was written")
            done += part[1]
            if progress is not None:
                progress(done)


def _view(mapping: mmap.mmap, array: StoredArray) -> np.ndarray:
    dtype = _DTYPES[array.dtype]
    flat = np.frombuffer(mapping, dtype, prod(array.shape), array.offset)
    return flat.reshape(array.shape)
