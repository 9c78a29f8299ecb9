"""The packed cache on disk: entries of a data file and a manifest, made whole or not at all, or made again.

`<root>/packed/` holds, for each key, `<key>.json` (the manifest) and the data file it names,
`<key>.<content>.safetensors`. A writer fills `<key>.<random>.tmp`, hashes as it goes, fsyncs, renames, and
puts the manifest in place last: so an entry exists from the moment it is complete. Two writers of one key
are safe by unique names and renames alone; the lock only saves the second one's work, and tells whose
leftovers are a dead process's. What the arrays mean is `octavo.weights`' work.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from octavo.errors import CacheError, NotEnoughDiskError
from octavo.file_lock import Lock, locked
from octavo.packed_file import (
    DamagedFileError,
    FileContents,
    PackedFile,
    PackedFileWriter,
    StoredArray,
    header_bytes,
    map_packed_file,
    write_all,
)
from octavo.paths import private_folder
from octavo.units import readable_bytes
from octavo.version import __version__

_FOLDER = "packed"
_MANIFEST_VERSION = 1
_MAX_MANIFEST_BYTES = 1 << 26
_LEFTOVER_SECONDS = 24 * 3600.0
"""Where there are no locks, a leftover this old belongs to nobody."""

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
_OUR_FILE = re.compile(r"(?P<key>[0-9a-f]{32})\.(json|lock|[0-9a-f]{32}\.tmp|[0-9a-f]{16}\.safetensors)")


@dataclass(frozen=True, slots=True)
class EntryFacts:
    """What an entry is, for people; nothing of it decides what is loaded."""

    model: str
    layout: str
    format: str
    """Names of the formats, most bytes first."""
    formats: Mapping[str, Mapping[str, Any]]
    """Name -> `Format.to_manifest`."""
    parameters: Mapping[str, str]
    """Parameter -> the name of its format."""


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One packed model on disk."""

    key: str
    path: Path
    """Its data file."""
    nbytes: int
    """Of the data file."""
    model: str
    layout: str
    format: str
    last_used: float
    """Seconds since the epoch."""


def cache_entries(root: Path) -> list[CacheEntry]:
    """The complete entries under a cache root, last used first; their bytes are not verified."""
    entries = []
    for key in _files_by_key(root / _FOLDER):
        with suppress(DamagedFileError, OSError):
            data, contents, facts = _read_manifest(root / _FOLDER, key)
            used = _manifest_path(root / _FOLDER, key).stat().st_mtime
            shown = facts.model, facts.layout, facts.format
            entries.append(CacheEntry(key, data, contents.nbytes, *shown, last_used=used))
    return sorted(entries, key=lambda entry: entry.last_used, reverse=True)


def prune(
    root: Path,
    *,
    older_than_seconds: float | None = None,
    max_bytes: int | None = None,
    everything: bool = False,
) -> int:
    """Remove entries, and what dead processes left behind; returns the bytes freed.

    An entry goes if it was last used more than `older_than_seconds` ago, or if the entries used after it
    and it take more than `max_bytes`, or with `everything`. Entries being written stay, and a process that
    has one mapped keeps it.
    """
    folder = root / _FOLDER
    freed = _sweep(folder)
    kept_bytes = 0
    for entry in cache_entries(root):
        kept_bytes += entry.nbytes
        too_old = older_than_seconds is not None and time.time() - entry.last_used > older_than_seconds
        too_many = max_bytes is not None and kept_bytes > max_bytes
        if everything or too_old or too_many:
            with locked(_lock_path(folder, entry.key), wait_seconds=1.0) as lock:
                if lock is not Lock.BUSY:
                    freed += _remove_entry(folder, entry.key)
                    kept_bytes -= entry.nbytes
    return freed


class PackedCache:
    """Reads and writes entries under one cache root."""

    def __init__(self, root: Path) -> None:
        """`root` is `octavo.paths.cache_root`'s. Raises CacheError where the folder is not safe to use.

        Sweeps what dead processes left.
        """
        self._folder = private_folder(root / _FOLDER)
        _sweep(self._folder)

    def load(
        self, key: str, progress: Callable[[int], None] | None = None
    ) -> tuple[PackedFile, FileContents] | None:
        """The entry, mapped, every byte verified; None where there is none.

        `progress` gets the bytes verified so far. Raises DamagedFileError where it is not what was written.
        """
        try:
            data, contents, _ = _read_manifest(self._folder, key)
            mapped = map_packed_file(data, contents, progress)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DamagedFileError(f"{error.filename} cannot be read: {error.strerror}") from error
        with suppress(OSError):  # a read-only cache is still a cache
            os.utime(_manifest_path(self._folder, key))
        return mapped, contents

    def discard(self, key: str) -> None:
        """Remove an entry. Whoever has it mapped keeps it."""
        with self._typed_errors(0):
            _remove_entry(self._folder, key)

    @contextmanager
    def exclusive(
        self, key: str, *, wait_seconds: float, waiting: Callable[[], None] | None = None
    ) -> Iterator[Lock]:
        """Hold the key's lock for the block, so that one process packs and the others find its entry.

        `waiting` is called once, where another process holds it. BUSY: it has done so for all of
        `wait_seconds`. UNSUPPORTED: go on, it is safe.
        """
        with ExitStack() as stack:
            with self._typed_errors(0):
                path = _lock_path(self._folder, key)
                lock = stack.enter_context(locked(path, wait_seconds=wait_seconds, waiting=waiting))
            if lock is Lock.HELD:  # its last holder may have died while we waited
                _remove_leftovers(self._folder, key)
            yield lock

    @contextmanager
    def writing(
        self, key: str, facts: EntryFacts, *, array_bytes: int, arrays: int
    ) -> Iterator[Callable[[str, np.ndarray], None]]:
        """Make the key's entry of the arrays appended in the block, at most `arrays` of them.

        Leaving the block puts the entry in place, durably; an exception leaves nothing behind.
        `array_bytes` is about what they will take together. Raises NotEnoughDiskError before or while
        writing, and CacheError where writing fails otherwise.
        """
        needed_bytes = array_bytes + header_bytes(arrays)
        free = shutil.disk_usage(self._folder).free
        if needed_bytes > free:
            raise self._disk_full(needed_bytes, free)
        data_temporary = _temporary_path(self._folder, key)
        manifest_temporary = _temporary_path(self._folder, key)
        try:
            with self._typed_errors(needed_bytes):
                descriptor = os.open(data_temporary, _CREATE, 0o600)
            try:
                writer = PackedFileWriter(descriptor, arrays)

                def append(name: str, array: np.ndarray) -> None:
                    with self._typed_errors(needed_bytes, data_temporary):
                        writer.append(name, array)

                yield append
                with self._typed_errors(needed_bytes, data_temporary):
                    contents = writer.finish()
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            data = f"{key}.{_content_digest(contents)[:16]}.safetensors"
            with self._typed_errors(needed_bytes, data_temporary):
                # Both are complete before either gets its name: a full disk can no longer come between.
                _write_synced(manifest_temporary, _manifest(key, facts, data, contents))
                _rename_data(data_temporary, self._folder / data)
                os.replace(manifest_temporary, _manifest_path(self._folder, key))
                _sync_folder(self._folder)
        finally:
            _try_unlink(data_temporary)
            _try_unlink(manifest_temporary)

    @contextmanager
    def _typed_errors(self, needed_bytes: int, temporary: Path | None = None) -> Iterator[None]:
        """`temporary`: a file about to be removed, whose bytes will be free again."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                regained = 0 if temporary is None else _size_bytes(temporary)
                free = shutil.disk_usage(self._folder).free + regained
                raise self._disk_full(needed_bytes, free, reason=error.strerror) from error
            raise CacheError(
                f"cannot write packed weights to {self._folder}: {error.strerror}",
                remedy="Set OCTAVO_CACHE (or --cache-dir) to another folder, or use --no-cache.",
            ) from error

    def _disk_full(self, needed_bytes: int, free_bytes: int, reason: str | None = None) -> NotEnoughDiskError:
        stopped = "" if reason is None else f" ({reason})"
        return NotEnoughDiskError(
            f"the packed weights need {readable_bytes(needed_bytes)} in {self._folder}, "
            f"where {readable_bytes(free_bytes)} are free{stopped}",
            remedy="Free some space, set OCTAVO_CACHE (or --cache-dir) to another disk, or use --no-cache.",
            needed_bytes=needed_bytes,
            available_bytes=free_bytes,
        )


# --- the manifest --------------------------------------------------------------------------------


def _manifest(key: str, facts: EntryFacts, data: str, contents: FileContents) -> bytes:
    manifest = {
        "version": _MANIFEST_VERSION,
        "key": key,
        **asdict(facts),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "octavo": __version__,
        "data": data,
        **asdict(contents),
    }
    return json.dumps(manifest | {"checksum": _checksum(manifest)}, indent=1).encode()


def _read_manifest(folder: Path, key: str) -> tuple[Path, FileContents, EntryFacts]:
    """The data file's path and contents. Raises OSError, or DamagedFileError where it is not as written."""
    path = _manifest_path(folder, key)
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise DamagedFileError(f"{path.name} is larger than any manifest")
    try:
        manifest = json.loads(path.read_bytes())
        if manifest.pop("checksum") != _checksum(manifest) or manifest["version"] != _MANIFEST_VERSION:
            raise DamagedFileError(f"{path.name} is not what was written")
        facts = EntryFacts(**{field.name: manifest[field.name] for field in fields(EntryFacts)})
        contents = _contents(manifest)
        data = manifest["data"]
        named = _OUR_FILE.fullmatch(data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedFileError(f"{path.name} is not a manifest: {error}") from error
    if named is None or named["key"] != key:
        raise DamagedFileError(f"{path.name} names a file of another entry")
    return folder / data, contents, facts


def _contents(manifest: dict[str, Any]) -> FileContents:
    """Raises TypeError or KeyError; whether the numbers fit the file is seen when it is mapped."""
    arrays = tuple(StoredArray(**entry | {"shape": tuple(entry["shape"])}) for entry in manifest["arrays"])
    contents = FileContents(manifest["header_bytes"], manifest["header_sha256"], arrays)
    places = [contents.header_bytes, *(place for array in arrays for place in (array.offset, *array.shape))]
    if any(type(place) is not int for place in places):
        raise TypeError("a place that is no integer")
    return contents


def _checksum(manifest: dict[str, Any]) -> str:
    """Over the values, in one spelling: catches any change that is one."""
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _content_digest(contents: FileContents) -> str:
    return hashlib.sha256(json.dumps(asdict(contents)).encode()).hexdigest()


# --- files ---------------------------------------------------------------------------------------


def _manifest_path(folder: Path, key: str) -> Path:
    return folder / f"{key}.json"


def _lock_path(folder: Path, key: str) -> Path:
    return folder / f"{key}.lock"


def _temporary_path(folder: Path, key: str) -> Path:
    return folder / f"{key}.{uuid.uuid4().hex}.tmp"


def _files_by_key(folder: Path) -> dict[str, list[Path]]:
    """Our files in the folder; anything else there is not ours to touch."""
    files: dict[str, list[Path]] = defaultdict(list)
    with suppress(FileNotFoundError):
        for path in sorted(folder.iterdir()):
            found = _OUR_FILE.fullmatch(path.name)
            if found:
                files[found["key"]].append(path)
    return files


def _sweep(folder: Path) -> int:
    """Remove what writers that died left behind; returns the bytes freed. What cannot be removed stays."""
    freed = 0
    for key, files in _files_by_key(folder).items():
        kinds = sorted(path.suffix for path in files)
        if kinds != [".json", ".safetensors"]:
            with suppress(OSError), locked(_lock_path(folder, key)) as lock:
                if lock is Lock.HELD:
                    freed += _remove_leftovers(folder, key)
                elif lock is Lock.UNSUPPORTED:
                    freed += _remove_leftovers(folder, key, older_than_seconds=_LEFTOVER_SECONDS)
    return freed


def _remove_leftovers(folder: Path, key: str, older_than_seconds: float | None = None) -> int:
    """All files of a key but a readable manifest, the data file it names, and the lock."""
    kept = {_lock_path(folder, key)}
    with suppress(OSError, DamagedFileError):
        data, _, _ = _read_manifest(folder, key)
        if data.exists():
            kept |= {data, _manifest_path(folder, key)}
    leftovers = [path for path in _files_by_key(folder)[key] if path not in kept]
    if older_than_seconds is not None:
        latest = time.time() - older_than_seconds
        leftovers = [path for path in leftovers if path.stat().st_mtime < latest]
    return sum(map(_try_unlink, leftovers))


def _remove_entry(folder: Path, key: str) -> int:
    """The manifest first: without it there is no entry."""
    files = [path for path in _files_by_key(folder)[key] if path.suffix in (".json", ".safetensors")]
    return sum(map(_try_unlink, sorted(files, key=lambda path: path.suffix)))


def _try_unlink(path: Path) -> int:
    """Bytes freed; 0 where it was not there, or (Windows) somebody has it open."""
    nbytes = _size_bytes(path)
    try:
        path.unlink()
    except OSError:
        return 0
    return nbytes


def _size_bytes(path: Path) -> int:
    """0 where it is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _rename_data(temporary: Path, target: Path) -> None:
    """The target's name says its content: where Windows refuses since somebody has it mapped, it is there."""
    try:
        os.replace(temporary, target)
    except PermissionError:
        if not target.exists():
            raise


def _write_synced(path: Path, data: bytes) -> None:
    descriptor = os.open(path, _CREATE, 0o600)
    try:
        write_all(descriptor, memoryview(data))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make renames durable where there is a call for it: not on Windows, nor on some network file systems.

    What a power cut may undo without it is found by its hash.
    """
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
