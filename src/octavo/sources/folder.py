"""A folder with config.json and safetensors (one file, or shards and their index) as a `ModelSource`.

Only the files named in checkpoint_files.py are opened; code that came with the model is neither imported
nor copied. What the config means is `octavo.models`' work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.errors import IncompatibleModelError, ModelFormatError, ModelNotFoundError, UnsafeFileError
from octavo.sources import checkpoint_files as files
from octavo.sources.documents import MAX_DOCUMENT_BYTES, parse_object
from octavo.sources.files import FETCH_AGAIN, MappedFile, read_bounded
from octavo.sources.fingerprint import fingerprint
from octavo.sources.model_folder import ModelFolder
from octavo.sources.safetensors import SafeTensor, read_safetensors
from octavo.types import ModelSource, TokenizerKind, TokenizerSource

_MAX_TOKENIZER_BYTES = 128 << 20
_CUSTOM_CODE = "auto_map"


def load_folder(
    folder: ModelFolder, *, location: str, revision: str | None = None, weights: str | None = None
) -> ModelSource:
    """The model in a folder; `weights` names its safetensors file where the user did.

    Raises UnsafeFileError for pickle weights, files that lead out of the folder or are no files, and models
    that need their own code; ModelFormatError for damaged files; IncompatibleModelError where something is
    missing that no download would bring.
    """
    documents = _Documents(folder)
    config = documents.json(files.CONFIG)
    if config is None:
        raise IncompatibleModelError(
            f"{folder.path} has no {files.CONFIG}",
            remedy="Name the folder that holds the model's config.json and .safetensors files, or a .gguf file.",
        )
    notices = _custom_code_notices(config, location)
    weights = weights or files.choose_weights(folder.names(), str(folder.path))
    shards: dict[str, list[str]] = {weights: []}
    if weights == files.INDEX:
        shards = files.shard_names(documents.json(weights) or {}, str(folder.path / weights))
    tensors = _tensors(folder, shards)
    generation_config = documents.json("generation_config.json") or {}
    tokenizer_config = documents.json("tokenizer_config.json") or {}
    tokenizer = _tokenizer(documents, tokenizer_config)
    template = _chat_template(documents, tokenizer_config)
    return ModelSource(
        location=location,
        revision=revision,
        naming="huggingface",
        config=config,
        generation_config=generation_config,
        tokenizer=tokenizer,
        chat_template=template,
        tensors=tensors,
        fingerprint=fingerprint({name: folder.identity(name) for name in shards}, documents.read_so_far),
        notices=notices,
    )


class _Documents:
    """The small files of a folder, read as they are asked for and remembered for the fingerprint."""

    def __init__(self, folder: ModelFolder) -> None:
        self.folder = folder
        self.read_so_far: dict[str, bytes] = {}

    def bytes(self, name: str, limit_bytes: int = MAX_DOCUMENT_BYTES) -> bytes | None:
        path = self.folder.locate(name)
        if path is None:
            return None
        data = read_bounded(path, limit_bytes)
        self.read_so_far[name] = data
        return data

    def json(self, name: str) -> dict[str, Any] | None:
        data = self.bytes(name)
        return None if data is None else parse_object(data, str(self.folder.path / name))


def _tensors(folder: ModelFolder, shards: Mapping[str, list[str]]) -> dict[str, SafeTensor]:
    tensors: dict[str, SafeTensor] = {}
    for shard, promised in shards.items():
        path = folder.locate(shard)
        if path is None:
            raise ModelNotFoundError(
                f"{folder.path / shard} is missing, one of {len(shards)} files with the weights",
                remedy="Fetch the model again: the download is incomplete.",
            )
        found = read_safetensors(MappedFile.open(path))
        for name in promised:
            if name not in found:
                raise ModelFormatError(
                    f"{files.INDEX} puts the tensor {name!r:.100} in {path.name}, where it is not",
                    remedy=FETCH_AGAIN,
                )
        for name in found.keys() & tensors.keys():
            raise ModelFormatError(
                f"the tensor {name!r:.100} stands in two files of {folder.path}, one of them {shard}",
                remedy=FETCH_AGAIN,
            )
        tensors.update(found)
    return tensors


def _custom_code_notices(config: Mapping[str, Any], location: str) -> tuple[str, ...]:
    if not config.get(_CUSTOM_CODE):
        return ()
    if not isinstance(config.get("model_type"), str):
        raise UnsafeFileError(
            f"{location} can only be loaded by running code of its own (config key {_CUSTOM_CODE})",
            remedy="Octavo never runs code of a checkpoint: choose a model of a supported family.",
        )
    return (f"code that came with the model ({_CUSTOM_CODE}) is not used",)


def _tokenizer(documents: _Documents, config: Mapping[str, Any]) -> TokenizerSource | None:
    merged = {**(documents.json("special_tokens_map.json") or {}), **config}
    kinds: dict[str, TokenizerKind] = {
        "tokenizer.json": "tokenizer.json",
        "tekken.json": "tekken",
        "tokenizer.model": "sentencepiece",
    }
    for name, kind in kinds.items():
        data = documents.bytes(name, _MAX_TOKENIZER_BYTES)
        if data is not None:
            return TokenizerSource(kind, data=data, config=merged)
    return None


def _chat_template(documents: _Documents, tokenizer_config: Mapping[str, Any]) -> str | None:
    jinja, as_json = files.TEMPLATE_FILES
    data = documents.bytes(jinja)
    if data is not None:
        try:
            return data.decode("utf-8") or None
        except UnicodeDecodeError as error:
            raise ModelFormatError(
                f"{documents.folder.path / jinja} is not UTF-8 at byte {error.start}", remedy=FETCH_AGAIN
            ) from error
    found = (documents.json(as_json) or tokenizer_config).get("chat_template")
    if isinstance(found, list):  # named templates
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise ModelFormatError(
            f"the chat template in {documents.folder.path} is {type(found).__name__}, not text",
            remedy=FETCH_AGAIN,
        )
    return found or None
