"""The Hugging Face hub, through huggingface_hub's public functions (1.5 to 2.x).

A revision is pinned to its commit, only the files that are read are fetched, and every failure becomes one
of our errors without the library's text, which may hold signed addresses. What was downloaded before
is hub_cache.py's. The token is the library's business (HF_TOKEN).
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from octavo.errors import (
    DownloadError,
    GatedModelError,
    IncompatibleModelError,
    ModelNotFoundError,
    NotEnoughDiskError,
    OctavoError,
    UnsafeFileError,
)
from octavo.sources import checkpoint_files as files
from octavo.sources.disk import is_full, not_enough_space
from octavo.sources.documents import MAX_DOCUMENT_BYTES, parse_object
from octavo.sources.files import read_bounded
from octavo.sources.gguf_names import choose_gguf, gguf_names, parts_of
from octavo.sources.hub_cache import cache_folder, quiet
from octavo.sources.hub_transfer import bring_blob, guarded, part_path
from octavo.types import Progress
from octavo.units import readable_bytes

_COMMIT = re.compile(r"[0-9a-f]{40}")
_CACHE_SETTING = "HF_HOME"
_TIMEOUT_SECONDS = 20.0
_SLACK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The files of one commit on disk, as many as are needed."""

    path: Path
    commit: str
    gguf: tuple[str, ...] = ()
    """The files of the GGUF model in it that is meant, the first part first; () for safetensors."""
    notices: tuple[str, ...] = ()


def fetch(
    repository: str,
    *,
    gguf: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> Snapshot:
    """The files of `repository` ("org/name"): config, tokenizer and safetensors, or one GGUF model.

    `gguf` says which, by a file or a tag, where there are several or safetensors as well (see gguf_names.py).
    Without a network, and where the hub fails, what was downloaded before is used if it is complete.
    Raises ModelNotFoundError (no such repository, revision or file), GatedModelError, DownloadError,
    NotEnoughDiskError, and as `choose_weights`.
    """
    import huggingface_hub

    wanted = _Wanted(repository, gguf, revision or "main")
    with quiet():
        if offline or huggingface_hub.is_offline_mode():
            return _cached(wanted) or _fail_offline(wanted)
        if _COMMIT.fullmatch(wanted.revision) and (snapshot := _cached(wanted)):
            return snapshot  # a commit never changes, so there is nothing to ask
        download = _Download(wanted, progress)
        try:
            with guarded():
                return download.run()
        except OctavoError:
            raise
        except Exception as error:  # the HTTP client's classes differ between versions of the library
            if is_full(error):
                raise download.no_space() from error
            failure = _translated(error, wanted)
            snapshot = _cached(wanted) if type(failure) is DownloadError else None
            if snapshot is None:
                raise failure from error
            notice = f"{failure.message}: using commit {snapshot.commit[:12]}, downloaded before"
            return replace(snapshot, notices=(notice,))


@dataclass(frozen=True, slots=True)
class _Wanted:
    repository: str
    gguf: str | None
    revision: str

    def as_arguments(self) -> str:
        """As a command takes it."""
        tag = "" if self.gguf is None else f":{self.gguf}"
        return f"{self.repository}{tag}" + ("" if self.revision == "main" else f" --revision {self.revision}")

    def __str__(self) -> str:
        return self.repository if self.revision == "main" else f"{self.repository} at {self.revision}"


class _Download:
    """One fetch over the network: list, choose, check the disk, download, verify."""

    def __init__(self, wanted: _Wanted, progress: Progress | None) -> None:
        self._wanted = wanted
        self._progress = progress
        self._done_bytes = 0
        self._total_bytes = 0
        self._begun_bytes = 0
        """Of an earlier try, which is gone on with."""

    def run(self) -> Snapshot:
        wanted = self._wanted
        sizes, commit, hashes = self._listing(wanted.revision)
        parts = self._gguf(sizes)
        if parts:
            self._require_space({part: sizes[part] for part in parts}, commit, hashes)
        else:
            self._refuse_unreadable(sizes)
        # By its name and not by commit, so that the library remembers what the name stood for, for offline starts.
        first = parts[0] if parts else files.CONFIG
        folder = self._file(first, commit, sizes, hashes, revision=wanted.revision)
        if folder.name != commit:  # the branch moved just now
            sizes, commit, hashes = self._listing(folder.name)
            parts = self._gguf(sizes)
        for part in parts:
            self._file(part, commit, sizes, hashes)
        if not parts:
            self._checkpoint(folder, sizes, hashes)
        return Snapshot(folder, commit, parts)

    def _gguf(self, sizes: Mapping[str, int]) -> tuple[str, ...]:
        """The parts of the GGUF model that is meant; () where the repository holds safetensors and none is named."""
        if not _means_gguf(self._wanted, sizes):
            return ()
        parts = choose_gguf(
            sizes,
            self._wanted.gguf,
            self._wanted.repository,
            shown=lambda model: (
                f"{model} ({readable_bytes(sum(sizes.get(part, 0) for part in parts_of(model)))})"
            ),
        )
        for part in parts:
            if not all(files.is_plain(name) for name in part.split("/")):
                raise UnsafeFileError(
                    f"{self._wanted} lists {part!r:.100}, which is no plain file name",
                    remedy="Do not use this repository, or ask its owner to rename the file.",
                )
        return parts

    def _checkpoint(self, folder: Path, sizes: Mapping[str, int], hashes: Mapping[str, str]) -> None:
        """The rest of a safetensors checkpoint: documents first, so that weights on disk mean a whole model."""
        commit = folder.name
        weights = files.choose_weights(sizes, self._wanted.repository)
        names = [name for name in files.DOCUMENTS if name in sizes and name != files.CONFIG]
        if weights == files.INDEX:
            self._file(weights, commit, sizes, hashes)
            shards = _shards(folder)
            for shard in shards:
                if shard not in sizes:
                    self._fail_without(shard)
            names += shards
        else:
            names.append(weights)
        self._require_space({name: sizes[name] for name in names}, commit, hashes)
        for name in names:
            self._file(name, commit, sizes, hashes)

    def _listing(self, revision: str) -> tuple[dict[str, int], str, dict[str, str]]:
        """Name -> size of every file, the commit, and name -> SHA-256 of those the hub has one of."""
        import huggingface_hub

        info = huggingface_hub.HfApi().model_info(
            self._wanted.repository, revision=revision, files_metadata=True, timeout=_TIMEOUT_SECONDS
        )
        siblings = info.siblings or []
        hashes = {file.rfilename: file.lfs.sha256 for file in siblings if file.lfs is not None}
        return {file.rfilename: file.size or 0 for file in siblings}, str(info.sha), hashes

    def _refuse_unreadable(self, sizes: Mapping[str, int]) -> None:
        repository = self._wanted.repository
        files.choose_weights(sizes, repository)
        if files.CONFIG not in sizes:
            raise IncompatibleModelError(
                f"{repository} has no {files.CONFIG}", remedy="Choose a repository that holds a whole model."
            )

    def _fail_without(self, name: str) -> NoReturn:
        raise ModelNotFoundError(
            f"{self._wanted} has no file {name}", remedy="Choose another model or revision."
        )

    def _require_space(self, sizes: Mapping[str, int], commit: str, hashes: Mapping[str, str]) -> None:
        """Check the disk for what is not there yet; the progress bar counts it and what an earlier try brought."""
        missing = {name: size for name, size in sizes.items() if not self._is_cached(name, commit)}
        self._total_bytes = sum(missing.values())
        self._done_bytes = 0
        parts = (part_path(self._wanted.repository, hashes.get(name, "")) for name in missing)
        self._begun_bytes = sum(part.stat().st_size for part in parts if part is not None and part.exists())
        if (error := self.no_space()).available_bytes < error.needed_bytes:
            raise error

    def no_space(self) -> NotEnoughDiskError:
        """The error where what is still to come does not fit."""
        left_bytes = max(0, self._total_bytes - self._done_bytes - self._begun_bytes)
        return not_enough_space(
            cache_folder(), left_bytes, f"downloading {self._wanted}", setting=_CACHE_SETTING
        )

    def _is_cached(self, name: str, commit: str) -> bool:
        return _cached_path(_Wanted(self._wanted.repository, None, commit), name) is not None

    def _file(
        self,
        name: str,
        commit: str,
        sizes: Mapping[str, int],
        hashes: Mapping[str, str],
        *,
        revision: str | None = None,
    ) -> Path:
        """Download a file of a commit unless it is there; returns the snapshot's folder.

        `revision` is a name of the commit.
        """
        import huggingface_hub

        repository, was_cached = self._wanted.repository, self._is_cached(name, commit)
        # Mirrors may list no sizes.
        most_bytes = 2 * sizes[name] + _SLACK_BYTES if sizes[name] else sys.maxsize
        verified = False
        if not was_cached and name in hashes:
            verified = bring_blob(repository, name, commit, sizes[name], hashes[name], self._report)
        path = Path(
            huggingface_hub.hf_hub_download(
                repository,
                name,
                revision=revision or commit,
                cache_dir=cache_folder(),
                tqdm_class=_silent_bar(self._report, most_bytes),
            )
        )
        if not was_cached:
            if name in hashes and not verified:
                self._verify(path, hashes[name])
            self._report(path.stat().st_size)
            self._done_bytes += path.stat().st_size
        return path.parents[name.count("/")]

    def _report(self, file_bytes: int) -> None:
        if self._progress is not None and self._total_bytes:
            done = min(self._done_bytes + file_bytes, self._total_bytes)
            self._progress("downloading", done, self._total_bytes)

    def _verify(self, path: Path, sha256: str) -> None:
        """The library compares sizes only. A damaged file is deleted, so that the next try fetches it again."""
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise DownloadError(
                f"{path.name} of {self._wanted} arrived damaged: its SHA-256 is {found}, not {sha256}",
                remedy="Try again; if it stays so, a proxy or mirror on the way changes files.",
            )


def _cached(wanted: _Wanted) -> Snapshot | None:
    """A snapshot that was downloaded before, if its weights are all there."""
    folder = _cached_folder(wanted)
    if folder is None:
        return None
    try:
        names = _names(folder)
        if _means_gguf(wanted, names):
            return Snapshot(folder, folder.name, choose_gguf(names, wanted.gguf, wanted.repository))
        if files.CONFIG not in names:
            return None
        indexed = files.choose_weights(names, str(folder)) == files.INDEX
        if indexed and not set(_shards(folder)) <= set(names):
            return None
    except OctavoError:
        return None
    return Snapshot(folder, folder.name)


def _means_gguf(wanted: _Wanted, names: Collection[str]) -> bool:
    if wanted.gguf is not None:
        return True
    return bool(gguf_names(names)) and not any(name.endswith(".safetensors") for name in names)


def _cached_folder(wanted: _Wanted) -> Path | None:
    """Where the files of a revision lie, as many as there are."""
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                wanted.repository,
                revision=wanted.revision,
                cache_dir=cache_folder(),
                local_files_only=True,
                allow_patterns=[],  # whether all that is needed is there, is seen below
            )
        )
    except huggingface_hub.errors.LocalEntryNotFoundError:
        return None


def _names(folder: Path) -> list[str]:
    """Of the files in a snapshot, those in folders as FOLDER/NAME."""
    paths = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return [path.relative_to(folder).as_posix() for path in paths if path.exists()]


def _cached_path(wanted: _Wanted, name: str) -> Path | None:
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(
        wanted.repository, name, cache_dir=cache_folder(), revision=wanted.revision
    )
    return Path(found) if isinstance(found, str) else None


def _shards(folder: Path) -> list[str]:
    path = folder / files.INDEX
    index = parse_object(read_bounded(path, MAX_DOCUMENT_BYTES), str(path))
    return sorted(files.shard_names(index, files.INDEX))


def _silent_bar(report: Callable[[int], None], most_bytes: int) -> type:
    """A progress bar class for one file that draws nothing, reports the bytes done, and ends a file without end.

    For files in Xet storage the library makes two bars, of bytes received and written; the further one counts.
    They may be more than the file's: `most_bytes` leaves room.
    """
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]  # documented, but not in its __all__

    furthest = 0

    class SilentBar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"disable": True})  # type: ignore[no-untyped-call]
            self._bytes = int(options.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            nonlocal furthest
            self._bytes += int(n or 0)
            furthest = max(furthest, self._bytes)
            if furthest > most_bytes:
                raise DownloadError(
                    f"a file goes on after {furthest:,} bytes, far beyond what the hub's list says",
                    remedy="Try again; if it stays so, a proxy or mirror on the way changes files.",
                )
            report(furthest)

    return SilentBar


def _fail_offline(wanted: _Wanted) -> NoReturn:
    raise DownloadError(
        f"{wanted} is not on this machine, or not all of it, and offline mode is on",
        remedy=f"Run once without --offline and HF_HUB_OFFLINE: octavo models pull {wanted.as_arguments()}",
    )


def _translated(error: Exception, wanted: _Wanted) -> OctavoError:
    """Our error for one of the library's. Its text is left out: it may hold a signed address."""
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return _translated(error.__cause__, wanted)
    if isinstance(error, errors.GatedRepoError):
        return GatedModelError(
            f"{wanted.repository} is gated: only those who accepted its license may download it (HTTP {status})",
            remedy=f"Accept the license at {constants.ENDPOINT}/{wanted.repository}, and set HF_TOKEN to a token "
            "of that account.",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelNotFoundError(
            f"the hub has no model {wanted.repository}, or it is private",
            remedy="Check the spelling; for a private model set HF_TOKEN to a token that may read it.",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFoundError(
            f"{wanted.repository} has no revision {wanted.revision}",
            remedy="Name a branch, a tag or a full commit of the model with --revision.",
        )
    if status in (401, 403):
        return GatedModelError(
            f"the hub refuses access to {wanted.repository} (HTTP {status})",
            remedy="Set HF_TOKEN to a valid token that may read it.",
        )
    if isinstance(error, errors.EntryNotFoundError) and status is not None:
        return ModelNotFoundError(
            f"{wanted} lost a file while it was being downloaded", remedy="Try again, or name a --revision."
        )
    if type(error) is OSError and error.errno is None:
        why = "a file came with another length than was announced"
    elif status is not None:
        why = f"the hub answered HTTP {status}"
    elif isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EACCES,
        errno.EROFS,
    ):
        return DownloadError(
            f"cannot write to the hub's cache {cache_folder()}: {error.strerror}",
            remedy=f"Correct its permissions, or set {_CACHE_SETTING} to another folder.",
        )
    else:
        why = f"no answer from {constants.ENDPOINT} ({type(error).__name__})"
    return DownloadError(
        f"{wanted} could not be downloaded: {why}",
        remedy="Check the network, HTTPS_PROXY and HF_ENDPOINT, and try again.",
    )
