"""The config of a GGUF file in Hugging Face's words: what config.json and generation_config.json would say.

Keys: docs/gguf.md of ggml. Where metadata are silent, llama.cpp's defaults hold, since the files are
written for it. Every `<architecture>.*` key is translated, known to change nothing, or an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.errors import UnsupportedConfigError
from octavo.sources.gguf import GGUFFile
from octavo.sources.gguf_architectures import ARCHITECTURES
from octavo.sources.gguf_metadata import MetadataReader, shortest


def config_from_gguf(gguf: GGUFFile) -> dict[str, Any]:
    """config.json of the model in `gguf`.

    Raises UnsupportedConfigError (naming the key) for an architecture or feature we cannot translate, and
    ModelFormatError for a value that is missing or malformed.
    """
    architecture = str(gguf.metadata.get("general.architecture"))
    if gguf.metadata.get("general.type") == "adapter":
        raise UnsupportedConfigError(
            f"{gguf.path} is an adapter, not a model",
            remedy="Name the GGUF file of the model it was trained on.",
            key="general.type",
        )
    if architecture not in ARCHITECTURES:
        raise UnsupportedConfigError(
            f"{gguf.path} has the architecture {architecture!r:.60}, which cannot be read from GGUF "
            f"(supported: {', '.join(ARCHITECTURES)})",
            remedy="Choose a model of a supported architecture.",
            key="general.architecture",
        )
    reader = MetadataReader(gguf, architecture)
    config = ARCHITECTURES[architecture](reader)
    reader.finish()
    return config


def generation_config_from_gguf(metadata: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """generation_config.json of the model: start, stop and padding ids, and recommended sampling.

    `eos_token_id` lists every id that ends an answer: end of text, of turn, of message. Ids outside the
    vocabulary are "none" in some files, and left out as llama.cpp does.
    """
    result: dict[str, Any] = {}

    def token(name: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int and 0 <= value < vocab_size else None

    for key, name in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        if (value := token(name)) is not None:
            result[key] = value
    stops = [value for name in ("eos", "eot", "eom") if (value := token(name)) is not None]
    if stops:
        result["eos_token_id"] = list(dict.fromkeys(stops))
    for key, name in _SAMPLING.items():
        if (value := metadata.get(f"general.sampling.{name}")) is not None:
            result[key] = shortest(value)
    return result


_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
