"""A GGUF file as a `ModelSource`: its config, tokenizer, chat template and tensors, all from one file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.errors import IncompatibleModelError
from octavo.sources.fingerprint import fingerprint, local_identity
from octavo.sources.gguf import GGUFFile, read_gguf
from octavo.sources.gguf_config import config_from_gguf, generation_config_from_gguf
from octavo.sources.gguf_rope import ROPE_FACTORS
from octavo.types import ModelSource, TokenizerSource

_SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.IGNORECASE)
_CHAT_TEMPLATE = "tokenizer.chat_template"


def load_gguf(
    path: Path, *, location: str, revision: str | None = None, identity: str | None = None
) -> ModelSource:
    """The model in the GGUF file at `path`.

    `identity` says which weights these are (see fingerprint.py); None takes the local file's. Raises
    ModelFormatError for a damaged file, UnsupportedConfigError for a model we cannot compute, and
    IncompatibleModelError for a part of a split model.
    """
    refuse_split(path.name)
    gguf = read_gguf(path)
    parts = gguf.metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise _split_error(path.name, parts)
    config = config_from_gguf(gguf)
    # The rope factors are no parameter: the config has taken them in.
    tensors = {name: tensor for name, tensor in gguf.tensors.items() if name not in ROPE_FACTORS}
    template = gguf.metadata.get(_CHAT_TEMPLATE)
    return ModelSource(
        location=location,
        revision=revision,
        naming="gguf",
        config=config,
        generation_config=generation_config_from_gguf(gguf.metadata, config["vocab_size"]),
        tokenizer=_tokenizer(gguf.metadata),
        chat_template=template if isinstance(template, str) and template else None,
        tensors=tensors,
        fingerprint=fingerprint(
            {"model.gguf": identity or local_identity(gguf.file.status)}, {"header": gguf.header}
        ),
        quantized_as=_quantized_as(gguf),
    )


def refuse_split(name: str) -> None:
    """Raise IncompatibleModelError if a file's name says that it is a part of a split model."""
    if match := _SPLIT.search(name):
        raise _split_error(name, int(match[1]))


def _split_error(name: str, parts: int) -> IncompatibleModelError:
    return IncompatibleModelError(
        f"{name} is one of {parts} parts of a split GGUF model, which cannot be read",
        remedy="Merge them with llama.cpp: llama-gguf-split --merge FIRST-PART.gguf MERGED.gguf",
    )


def _tokenizer(metadata: Mapping[str, Any]) -> TokenizerSource | None:
    if "tokenizer.ggml.model" not in metadata or "tokenizer.ggml.tokens" not in metadata:
        return None
    entries = {
        key: value
        for key, value in metadata.items()
        if key.startswith("tokenizer.") and not key.startswith(_CHAT_TEMPLATE)
    }
    return TokenizerSource("gguf", metadata=entries)


def _quantized_as(gguf: GGUFFile) -> tuple[str, ...]:
    sizes: dict[str, int] = {}
    for tensor in gguf.tensors.values():
        if tensor.type.block_elements > 1:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return tuple(sorted(sizes, key=lambda name: -sizes[name]))
