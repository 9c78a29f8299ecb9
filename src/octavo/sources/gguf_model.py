"""A GGUF file, or a split one's parts, as a `ModelSource`: config, tokenizer, chat template and tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from octavo.sources.fingerprint import fingerprint, local_identity
from octavo.sources.gguf import GGUFFile
from octavo.sources.gguf_config import config_from_gguf, generation_config_from_gguf
from octavo.sources.gguf_rope import ROPE_FACTORS
from octavo.sources.gguf_split import joined, read_parts
from octavo.types import ModelSource, TokenizerSource

_CHAT_TEMPLATE = "tokenizer.chat_template"


def load_gguf(
    path: Path,
    *,
    location: str,
    others: Sequence[Path] = (),
    revision: str | None = None,
    identity: str | None = None,
) -> ModelSource:
    """The model in the GGUF file at `path`, and in the `others` that follow where it is split.

    `identity` says which weights these are (see fingerprint.py); None takes the local files'. Raises
    ModelFormatError for damaged files and parts that do not belong together, and UnsupportedConfigError for a
    model we cannot compute.
    """
    parts = read_parts((path, *others))
    gguf = joined(parts)
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
            {"model.gguf": identity or " ".join(local_identity(part.file.status) for part in parts)},
            {f"header {number}" if number else "header": part.header for number, part in enumerate(parts)},
        ),
        quantized_as=_quantized_as(gguf),
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
