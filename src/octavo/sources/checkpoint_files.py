"""Which files of a checkpoint are read, decided from their names alone; the same for folders and the hub.

Safetensors, else a GGUF file that is named. Pickle files run code when they are loaded, so they are never
opened, and a checkpoint that has nothing else is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from octavo.errors import IncompatibleModelError, ModelFormatError, UnsafeFileError
from octavo.sources.files import FETCH_AGAIN
from octavo.sources.listing import listed

CONFIG = "config.json"
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
DOCUMENTS = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    *TEMPLATE_FILES,
)
"""All that may be read beside the weights."""

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,254}")


def choose_weights(names: Collection[str], where: str) -> str:
    """The safetensors file or index to read, of the files at the top of a checkpoint.

    Raises UnsafeFileError where only pickle files hold weights, IncompatibleModelError where nothing does,
    and ModelFormatError where it cannot be told which of several files is meant.
    """
    for name in (SINGLE, INDEX):
        if name in names:
            return name
    others = sorted(name for name in names if name.endswith(".safetensors") and is_plain(name))
    if "adapter_config.json" in names:
        raise IncompatibleModelError(
            f"{where} holds an adapter, not a model", remedy="Name the model that the adapter was trained on."
        )
    if len(others) == 1:
        return others[0]
    if others:
        raise ModelFormatError(
            f"{where} has {len(others)} safetensors files ({listed(others)}) but no {INDEX}",
            remedy=f"Add the {INDEX} that came with them, or name the one file that holds the model.",
        )
    refuse_pickles(names, where)
    raise IncompatibleModelError(
        f"{where} has no weights that can be read ({listed(sorted(names)) or 'no files at all'})",
        remedy="Name a model with .safetensors or .gguf files.",
    )


def refuse_pickles(names: Collection[str], where: str) -> None:
    """Raise UnsafeFileError naming the pickle files among `names`, if any."""
    pickles = sorted(name for name in names if name.lower().endswith(PICKLES))
    if pickles:
        raise UnsafeFileError(
            f"{where} has its weights in {listed(pickles)}: loading such files can run any code, so Octavo never does",
            remedy="Name a copy of the model with .safetensors files, or convert it with safetensors.torch.save_model "
            "on a machine where running its code is safe.",
        )


def shard_names(index: Mapping[str, Any], name: str) -> dict[str, list[str]]:
    """Shard -> the tensors an index puts there. Raises UnsafeFileError where a shard is no plain file name."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFormatError(f"{name} has no weight_map", remedy=FETCH_AGAIN)
    shards: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not is_plain(shard):
            raise UnsafeFileError(
                f"{name} puts the tensor {tensor!r:.100} in {shard!r:.100}, which is no plain file name",
                remedy="Do not use this copy: an index may only name files beside it.",
            )
        if not shard.endswith(".safetensors"):
            refuse_pickles([shard], name)
            raise ModelFormatError(
                f"{name} names the shard {shard!r:.100}, which is no safetensors file", remedy=FETCH_AGAIN
            )
        shards.setdefault(shard, []).append(tensor)
    return shards


def is_plain(name: str) -> bool:
    """A file name without a folder, a drive, or anything a shell or file system treats specially."""
    return _PLAIN_NAME.fullmatch(name) is not None
