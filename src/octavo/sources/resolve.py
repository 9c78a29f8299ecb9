"""From what a user names to a `ModelSource`: the default model, a file or folder, or a hub repository.

A path that exists wins over a hub id of the same name. Nothing is printed; what the user should know
stands in `ModelSource.notices`.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import replace
from pathlib import Path

from octavo.errors import DownloadError, GatedModelError, InvalidParameterError, ModelNotFoundError
from octavo.sources import default
from octavo.sources.checkpoint_files import INDEX, refuse_pickles, shard_names
from octavo.sources.documents import MAX_DOCUMENT_BYTES, parse_object
from octavo.sources.files import read_bounded
from octavo.sources.folder import load_folder
from octavo.sources.gguf_model import load_gguf
from octavo.sources.gguf_names import choose_gguf, gguf_names, parts_of
from octavo.sources.model_folder import ModelFolder
from octavo.types import ModelSource, Progress

_DEFAULT = "default"
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?P<repository>{_PART}/{_PART})(?::(?P<gguf>[^:]+))?")
_RELATIVE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,254}")
_FILE_SUFFIXES = (".gguf", ".safetensors")
_HOW_IDS_LOOK = (
    "a hub id looks like org/name, and a GGUF file of one like org/name:FILE.gguf or org/name:Q4_K_M"
)


def resolve(
    model: str | None,
    *,
    revision: str | None = None,
    offline: bool = False,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> ModelSource:
    """Find a model, downloading it if need be; headers are read, weights are not.

    `model` is a folder, a .gguf or .safetensors file, a hub id ("org/name"), or None, "default" or its own name
    for the default model. After a folder or hub id, ":FILE.gguf" or the tag that ends its name (":Q4_K_M") says
    which of several GGUF models is meant. `cache_dir` is Octavo's own cache, where the default model lies.
    Raises InvalidParameterError for a revision of something that has none, ModelNotFoundError (with
    GatedModelError and DownloadError below it), NotEnoughDiskError, CacheError, and IncompatibleModelError
    with everything below it.
    """
    if model is None or model == _DEFAULT:
        _refuse_revision(revision, "the default model")
        return _default(offline, cache_dir, progress)
    path = Path(os.path.expanduser(model))
    if model and "\0" not in model and os.path.lexists(path):
        _refuse_revision(revision, model)
        return _local(path, model)
    folder, colon, named = model.rpartition(":")
    if colon and named and "\0" not in model and os.path.isdir(os.path.expanduser(folder)):
        _refuse_revision(revision, model)
        return _gguf_in(ModelFolder.open(Path(os.path.expanduser(folder))), folder, named)
    if model == default.NAME:  # as Octavo itself calls it
        _refuse_revision(revision, "the default model")
        return _default(offline, cache_dir, progress)
    hub_id = _HUB_ID.fullmatch(model)
    if hub_id is None or (model.lower().endswith(_FILE_SUFFIXES) and not hub_id["gguf"]):
        raise _not_found(path, model)
    try:
        return _from_hub(hub_id["repository"], hub_id["gguf"], revision, offline, progress)
    except GatedModelError:
        raise
    except ModelNotFoundError as error:
        if close := _close_names(path):  # it may have been meant as a path
            error.remedy = f"Did you mean {close}? {error.remedy}"
        raise


def _default(offline: bool, cache_dir: Path | None, progress: Progress | None) -> ModelSource:
    path = default.locate(cache_dir)
    if path is None:
        if offline:
            raise DownloadError(
                f"{default.NAME} is not on this machine, and offline mode is on",
                remedy="Run once with a network: octavo models pull default",
            )
        path = default.pull(progress, cache_dir)
    source = load_gguf(path, location=default.NAME, identity=f"default {default.SHA256}")
    return replace(source, generation_config={**source.generation_config, **default.SAMPLING})


def _local(path: Path, location: str) -> ModelSource:
    if not path.is_dir():
        return _local_file(path, location)
    folder = ModelFolder.open(path)
    names = folder.names()
    if not gguf_names(names) or any(name.endswith(".safetensors") for name in names):
        return load_folder(folder, location=location)
    return _gguf_in(folder, location, None)


def _gguf_in(folder: ModelFolder, location: str, named: str | None) -> ModelSource:
    """One of the GGUF models of a local folder; one in a folder within has to be named."""
    parts = choose_gguf(folder.names() if named is None else folder.names_below(), named, location)
    first, *others = (_inside(folder, part) for part in parts)
    return load_gguf(first, others=others, location=location if named is None else str(first))


def _inside(folder: ModelFolder, name: str) -> Path:
    """The path of a file that is there and does not lead out of the folder."""
    folder.locate(name)
    return folder.path / name


def _local_file(path: Path, location: str) -> ModelSource:
    refuse_pickles([path.name], str(path.parent))
    if path.suffix.lower() != ".safetensors":
        return _gguf_file(path, location)
    folder = ModelFolder.open(path.parent)
    index = folder.locate(INDEX)
    if index is not None:
        shards = shard_names(parse_object(read_bounded(index, MAX_DOCUMENT_BYTES), str(index)), str(index))
        if path.name in shards:
            return load_folder(folder, location=location, weights=INDEX)
    return load_folder(folder, location=location, weights=path.name)


def _gguf_file(path: Path, location: str) -> ModelSource:
    """A part stands for its model, as a shard does."""
    names = parts_of(path.name)
    if len(names) == 1:
        return load_gguf(path, location=location)
    first, *others = choose_gguf(os.listdir(path.parent), path.name, str(path.parent))
    start = location if path.name == first else str(path.with_name(first))
    return load_gguf(path.with_name(first), others=[path.with_name(name) for name in others], location=start)


def _from_hub(
    repository: str, gguf: str | None, revision: str | None, offline: bool, progress: Progress | None
) -> ModelSource:
    for parameter, value in (("revision", revision), ("model", gguf)):
        if value is not None and (not _RELATIVE_NAME.fullmatch(value) or ".." in value):
            raise InvalidParameterError(
                f"{value!r:.100} cannot be the {parameter} of a hub repository",
                remedy=f"Name a branch, tag or commit with --revision; {_HOW_IDS_LOOK}.",
                parameter=parameter,
            )
    from octavo.sources.hub import fetch  # its modules take part of a start that needs none of them

    snapshot = fetch(repository, gguf=gguf, revision=revision, offline=offline, progress=progress)
    folder = ModelFolder.open(snapshot.path, snapshot.commit)
    if not snapshot.gguf:
        source = load_folder(folder, location=repository, revision=snapshot.commit)
    else:
        first, *others = (_inside(folder, part) for part in snapshot.gguf)
        source = load_gguf(
            first,
            others=others,
            location=f"{repository}:{snapshot.gguf[0]}",
            revision=snapshot.commit,
            identity=" ".join(folder.identity(part) for part in snapshot.gguf),
        )
    return replace(source, notices=source.notices + snapshot.notices)


def _refuse_revision(revision: str | None, what: str) -> None:
    if revision is not None:
        raise InvalidParameterError(
            f"--revision {revision} is for hub repositories, and {what} is none",
            remedy="Leave --revision out.",
            parameter="revision",
        )


def _not_found(path: Path, model: str) -> ModelNotFoundError:
    close = _close_names(path)
    return ModelNotFoundError(
        f"there is no file or folder {model!r:.200}, and it is no hub id",
        remedy=f"Did you mean {close}?" if close else f"Check the path; {_HOW_IDS_LOOK}.",
    )


def _close_names(path: Path) -> str:
    """Names like `path` in its folder, for a message; empty where there are none."""
    try:
        names = os.listdir(path.parent)
    except (OSError, ValueError):
        return ""
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return " or ".join(str(path.parent / name) for name in close if name.isprintable())
