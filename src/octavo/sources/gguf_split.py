"""A GGUF model of one file or of several, read as one: metadata of the first part, tensors of all.

Format: `split.no`, `split.count` and `split.tensors.count` as llama.cpp's gguf-split writes them into each part.
Which files are parts is decided before, from their names (gguf_names.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from octavo.errors import ModelFormatError
from octavo.sources.gguf import GGUFFile, GGUFTensor, read_gguf

_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_ARCHITECTURE = "general.architecture"


def read_parts(paths: Sequence[Path]) -> list[GGUFFile]:
    """The files of one model, in order, each seen to be the part that it stands for.

    Raises as `read_gguf`, and ModelFormatError naming the file that is a part of something else.
    """
    parts = [read_gguf(path) for path in paths]
    first = parts[0].metadata
    if len(parts) == 1:
        if first.get(_COUNT, 0) not in (0, 1):
            raise _wrong(
                parts[0],
                f"says that it is part {_ordinal(first)} of {first[_COUNT]!r:.40}, and its name does not",
                remedy="Give all parts the names they came with: NAME-00001-of-00003.gguf and so on.",
            )
        return parts
    for number, part in enumerate(parts):
        said = part.metadata
        if said.get(_COUNT) != len(parts) or said.get(_NUMBER) != number:
            raise _wrong(
                part,
                f"stands for part {number + 1} of {len(parts)}, but says that it is part {_ordinal(said)} "
                f"of {said.get(_COUNT)!r:.40}",
            )
        for key in (_TENSORS, _ARCHITECTURE):
            if said.get(key, first.get(key)) != first.get(key):
                raise _wrong(
                    part,
                    f"has {key} = {said[key]!r:.60}, and the first part {first.get(key)!r:.60}: "
                    "they are of different models",
                )
    return parts


def joined(parts: Sequence[GGUFFile]) -> GGUFFile:
    """The first part with the tensors of all. Raises ModelFormatError where one is there twice or some are not."""
    if len(parts) == 1:
        return parts[0]
    tensors: dict[str, GGUFTensor] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise _wrong(
                    part, f"has the tensor {name!r:.100}, which {tensors[name].file.path.name} has as well"
                )
            tensors[name] = tensor
    said = parts[0].metadata.get(_TENSORS)
    if said != len(tensors):
        raise _wrong(
            parts[0], f"says that the model has {said!r:.40} tensors; its parts hold {len(tensors):,}"
        )
    return replace(parts[0], tensors=tensors)


def _ordinal(metadata: Any) -> object:
    number = metadata.get(_NUMBER)
    return number + 1 if type(number) is int else number


def _wrong(
    part: GGUFFile,
    what: str,
    *,
    remedy: str = "Fetch all parts again, from one place and into one folder.",
) -> ModelFormatError:
    return ModelFormatError(f"{part.path} {what}", remedy=remedy)
