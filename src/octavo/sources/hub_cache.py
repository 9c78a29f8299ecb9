"""The models in the Hugging Face hub's cache on this machine, through huggingface_hub's public functions.

Where the cache is, is the library's business (HF_HOME, HF_HUB_CACHE). Whether a model is there whole is hub.py's.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from octavo.errors import ModelNotFoundError
from octavo.sources.gguf_names import choose_gguf


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A repository that was downloaded, by whatever program."""

    name: str
    size_bytes: int
    """On disk, of all its revisions."""
    commits: tuple[str, ...]
    last_used: float
    """Seconds since the epoch."""


def cached_models() -> tuple[CachedModel, ...]:
    """The models in the hub's cache, by name."""
    cache = _scan()
    models = [repository for repository in cache.repos if repository.repo_type == "model"] if cache else []
    return tuple(
        CachedModel(
            repository.repo_id,
            repository.size_on_disk,
            tuple(sorted(revision.commit_hash for revision in repository.revisions)),
            repository.last_accessed,
        )
        for repository in sorted(models, key=lambda repository: repository.repo_id)
    )


def cached_name(name: str) -> str | None:
    """What a model that is here is called: "org/name", or "org/name:FILE.gguf" also where a tag names it.

    None where nothing of its repository is here. Raises ModelNotFoundError where what follows the colon is
    none or several of the files that are.
    """
    repository, colon, named = name.partition(":")
    found = _repository(repository)
    if found is None or not colon:
        return None if found is None else name
    names = {file for file, _ in _files(found)}
    return f"{repository}:{choose_gguf(names, named, repository)[0]}"


def remove_cached(name: str) -> int:
    """Delete a model from the hub's cache, of all its revisions; returns the bytes freed.

    After a colon, one GGUF model of several can be named. Raises ModelNotFoundError where it is not there.
    """
    repository, colon, named = name.partition(":")
    found = _repository(repository)
    if found is None:
        raise ModelNotFoundError(
            f"{name} is not in the hub's cache", remedy="See what is there: octavo models list"
        )
    if colon:
        files = _files(found)
        parts = choose_gguf({file for file, _ in files}, named, repository)
        if any(file not in parts for file, _ in files):
            return _remove_files(files, parts)
    return _remove_repository(found)


def _remove_files(files: Sequence[tuple[str, Any]], names: Collection[str]) -> int:
    kept = {info.blob_path for file, info in files if file not in names}
    gone = {info.blob_path: info.size_on_disk for file, info in files if file in names}
    for file, info in files:
        if file in names:
            info.file_path.unlink(missing_ok=True)
    freed = {blob: size for blob, size in gone.items() if blob not in kept}
    for blob in freed:
        blob.unlink(missing_ok=True)
    return sum(freed.values())


def _remove_repository(found: Any) -> int:
    cache = _scan()
    # The library deletes by commit alone, and forks share commits: it may see only this repository.
    only = replace(cache, repos=frozenset({found}))
    strategy = only.delete_revisions(*(revision.commit_hash for revision in found.revisions))
    with quiet():
        strategy.execute()
    return int(strategy.expected_freed_size)


def _files(found: Any) -> list[tuple[str, Any]]:
    """Names in the repository, as FOLDER/NAME, and huggingface_hub's CachedFileInfo, of all revisions."""
    return [
        (file.file_path.relative_to(revision.snapshot_path).as_posix(), file)
        for revision in found.revisions
        for file in revision.files
    ]


def _repository(name: str) -> Any | None:
    """huggingface_hub's CachedRepoInfo."""
    cache = _scan()
    models = (repository for repository in cache.repos if repository.repo_type == "model") if cache else ()
    return next((repository for repository in models if repository.repo_id == name), None)


def _scan() -> Any:
    """huggingface_hub's HFCacheInfo, None where there is no cache."""
    import huggingface_hub

    with quiet():
        try:
            return huggingface_hub.scan_cache_dir(cache_folder())
        except huggingface_hub.CacheNotFound:
            return None


def cache_folder() -> Path:
    """The library's cache, or TRANSFORMERS_CACHE where only that is set."""
    from huggingface_hub import constants

    older = os.environ.get("TRANSFORMERS_CACHE")
    if older and not any(
        os.environ.get(name) for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME")
    ):
        return Path(older).expanduser()
    return Path(constants.HF_HUB_CACHE)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's warnings off the terminal: what matters is raised, or becomes a notice."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
