"""How checkpoints store weights: which Format a tensor's type is, and its raw rows taken apart, exactly.

Plain types stand here, GGUF's blocks in `ggml_blocks`, quantized Hugging Face checkpoints in `checkpoint`.
Shape letters: N output rows, K input columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from octavo.errors import IncompatibleModelError, ModelFormatError
from octavo.quant.format import Format
from octavo.quant.ggml_blocks import BLOCK_TYPES
from octavo.quant.plain import STORED_DTYPES, Plain, require_finite
from octavo.quant.rows import row_blocks

_PLAIN: Mapping[str, Plain] = {"f32": Plain("f32"), "f16": Plain("f16"), "bf16": Plain("bf16")}


def stored_format(dtype: str) -> Format | None:
    """The Format of a checkpoint's stored type (`TensorRef.dtype`); None for one that Octavo cannot read."""
    if dtype in BLOCK_TYPES:
        return BLOCK_TYPES[dtype].format
    return _PLAIN.get(dtype)


def require_stored_format(dtype: str, tensor: str) -> Format:
    """`stored_format`, or IncompatibleModelError naming the tensor and what to use instead."""
    found = stored_format(dtype)
    if found is None:
        raise IncompatibleModelError(
            f"{tensor} is stored as {dtype}, which Octavo cannot read",
            remedy=f"Use a file of this model in one of: {', '.join(sorted([*_PLAIN, *BLOCK_TYPES]))}.",
        )
    return found


def split_stored(dtype: str, raw: np.ndarray, columns: int) -> dict[str, np.ndarray]:
    """Raw rows of a checkpoint's tensor, as `TensorRef.read` gives them -> the arrays of its Format, exactly.

    Plain values are [N, columns] and come back as they are; GGUF's blocks are uint8 [N, bytes a row]. Raises
    ModelFormatError where a row has another width or a value, scale or minimum is not finite, and
    IncompatibleModelError for a type that cannot be read.
    """
    require_stored_format(dtype, "a tensor")
    if dtype in BLOCK_TYPES:
        return BLOCK_TYPES[dtype].split(raw, columns)
    return _plain(_PLAIN[dtype], raw, columns)


def _plain(format: Plain, raw: np.ndarray, columns: int) -> dict[str, np.ndarray]:
    if raw.dtype != STORED_DTYPES[format.dtype] or raw.shape[-1] != columns:
        raise ModelFormatError(
            f"rows of {columns} {format.dtype} values came as {raw.dtype} {list(raw.shape)}",
            remedy="The file is damaged: fetch it again.",
        )
    for block in row_blocks(raw.shape):
        require_finite(raw[block], format.dtype)
    return {"values": raw}
