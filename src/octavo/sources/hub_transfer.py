"""One large file of the hub into its cache, resumable, and a guard over what the hub's answers name.

huggingface_hub 2.x starts a file anew in each process and deletes what came where it fails. Files with a SHA-256
therefore come through here: bytes are appended to a part file beside the blob, which outlives errors and kills,
and become the blob only with the right hash; the library then finds the blob there and links it. Files in Xet
storage come through here too, by the plain address that the hub gives for each, but where HF_XET_HIGH_PERFORMANCE asks
for the library's own transfer: it reads from several places at once and starts anew when it was interrupted.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from octavo.errors import DownloadError, OctavoError, UnsafeFileError
from octavo.file_lock import Lock, locked
from octavo.sources.hub_cache import cache_folder

TIMEOUT_SECONDS = 20.0
"""Without a byte, a transfer has stalled."""
_TRIES = 3
"""In a row that bring nothing."""
_PAUSE_SECONDS = 1.0
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r'(?:W/)?"?[A-Za-z0-9_+=-][A-Za-z0-9_.+=-]{0,199}"?')


def part_path(repository: str, sha256: str) -> Path | None:
    """Where the bytes of a file are kept until all have come; None for what is no hash."""
    if not _SHA256.fullmatch(sha256):
        return None
    blobs = cache_folder() / f"models--{repository.replace('/', '--')}" / "blobs"
    return blobs / f"{sha256}.octavo-part"


def bring_blob(
    repository: str, name: str, commit: str, size_bytes: int, sha256: str, report: Callable[[int], None]
) -> bool:
    """Fetch a file into the cache's blobs, going on where an earlier try ended; False where the library has to.

    `report` is called with the bytes of the file that are here. Raises DownloadError for a file that is not what
    the hub's list says, OSError where the disk fails, and the library's and the HTTP client's errors.
    """
    import huggingface_hub

    part = part_path(repository, sha256)
    if part is None or size_bytes == 0:
        return False
    url = huggingface_hub.hf_hub_url(repository, name, revision=commit, endpoint=_endpoint())
    found = huggingface_hub.get_hf_file_metadata(url, timeout=TIMEOUT_SECONDS)
    if found.etag != sha256 or (found.xet_file_data is not None and _wants_xet()):
        return False
    part.parent.mkdir(parents=True, exist_ok=True)
    with locked(part.with_suffix(".octavo-lock")) as lock:
        if lock is not Lock.HELD:  # two that append would spoil the file
            return False
        if not _Transfer(url, found.location, part, size_bytes, report).run():
            return False
        with part.open("rb") as file:
            came = hashlib.file_digest(file, "sha256").hexdigest()
        if came != sha256:
            part.unlink()
            raise DownloadError(
                f"{name} of {repository} arrived damaged: its SHA-256 is {came}, not {sha256}",
                remedy="Try again; if it stays so, a proxy or mirror on the way changes files.",
            )
        os.replace(part, part.with_suffix(""))
    return True


class _Transfer:
    def __init__(
        self, url: str, location: str, part: Path, size_bytes: int, report: Callable[[int], None]
    ) -> None:
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented

        self._location, self._part, self._size_bytes, self._report = location, part, size_bytes, report
        self._headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        if _origin(location) != _origin(url):  # a storage host, whose address is signed
            self._headers.pop("authorization", None)

    def run(self) -> bool:
        """Append until the part is whole; False where the token is asked for at another host."""
        tries_left = _TRIES
        while (before := self._here_bytes()) < self._size_bytes:
            try:
                if not self._append(before):
                    return False
            except (OctavoError, OSError):  # the hub's refusals among them
                raise
            except Exception:  # the HTTP client's classes differ between versions of the library
                if self._here_bytes() <= before and tries_left <= 1:
                    raise
            tries_left = _TRIES if self._here_bytes() > before else tries_left - 1
            if not tries_left:
                raise DownloadError(
                    f"{urlsplit(self._location).hostname} ended a file after {self._here_bytes():,} of its "
                    f"{self._size_bytes:,} bytes",
                    remedy="Try again: what has come is kept. If it stays so, the mirror or proxy cuts files.",
                )
            if self._here_bytes() < self._size_bytes:
                time.sleep(_PAUSE_SECONDS)
        return True

    def _here_bytes(self) -> int:
        try:
            here = self._part.stat().st_size
        except FileNotFoundError:
            return 0
        if here > self._size_bytes:
            self._part.unlink()
            return 0
        return here

    def _append(self, start: int) -> bool:
        import huggingface_hub
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]  # documented

        headers = self._headers | ({"Range": f"bytes={start}-"} if start else {})
        with huggingface_hub.get_session().stream(
            "GET", self._location, headers=headers, follow_redirects=True, timeout=TIMEOUT_SECONDS
        ) as response:
            if response.status_code in (401, 403):
                return False
            if response.status_code == 416:
                self._part.unlink(missing_ok=True)
                return True
            hf_raise_for_status(response)
            goes_on = response.status_code == 206 and _range_start(response) == start
            # Neither side buffers: a kill loses nothing that has come.
            with self._part.open("ab" if goes_on else "wb", buffering=0) as file:
                here = start if goes_on else 0
                for chunk in response.iter_bytes():
                    if here + len(chunk) > self._size_bytes:
                        self._part.unlink()
                        raise _too_long(self._location, self._size_bytes)
                    left = memoryview(chunk)
                    while left:
                        left = left[file.write(left) :]
                    here += len(chunk)
                    self._report(here)
        return True


def _too_long(location: str, size_bytes: int) -> DownloadError:
    return DownloadError(
        f"{urlsplit(location).hostname} sends more than the {size_bytes:,} bytes that the hub's list says",
        remedy="Try again; if it stays so, a proxy or mirror on the way changes files.",
    )


def _range_start(response: Any) -> int | None:
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _wants_xet() -> bool:
    from huggingface_hub import constants

    return bool(getattr(constants, "HF_XET_HIGH_PERFORMANCE", False))


@contextmanager
def guarded() -> Iterator[None]:
    """Within, answers of the hub that would lead huggingface_hub's files out of its cache raise UnsafeFileError.

    The library makes paths of a HEAD answer's ETag and commit as they come (seen in 2.4).
    """
    import huggingface_hub

    hooks = huggingface_hub.get_session().event_hooks["response"]
    hooks.append(_check_answer)
    try:
        yield
    finally:
        with suppress(ValueError):
            hooks.remove(_check_answer)


def _check_answer(response: Any) -> None:
    headers = response.headers
    if response.request.method != "HEAD" or "X-Repo-Commit" not in headers:
        return  # the library takes names from no other answers
    etag = "X-Linked-ETag" if "X-Linked-ETag" in headers else "ETag"
    for name, allowed in (("X-Repo-Commit", _COMMIT), (etag, _ETAG)):
        value = headers.get(name)
        if value is not None and not allowed.fullmatch(value):
            raise UnsafeFileError(
                f"{response.request.url.host} answers with {name} {value!r:.100}, which cannot name a file",
                remedy="Check HF_ENDPOINT and HTTPS_PROXY: this is not how the hub answers.",
            )
