"""How checkpoints store weights: which Format a stored type is, and its raw rows taken apart, exactly.

Layouts of GGUF's blocks of 32 columns, little endian, as in ggml-common.h:

| type | bytes | fields                                                                      |
|------|-------|-----------------------------------------------------------------------------|
| q8_0 | 34    | f16 d; int8 q[32]                              weight = q * d                |
| q4_1 | 20    | f16 d; f16 m; u8 q[16]: column i low, i + 16 high    weight = q * d + m      |

Shape letters: N output rows, K input columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from octavo.errors import IncompatibleModelError, ModelFormatError
from octavo.quant.affine import Q4_1, Q8_0
from octavo.quant.format import Format
from octavo.quant.nibbles import join_nibbles
from octavo.quant.plain import STORED_DTYPES, Plain, require_finite
from octavo.quant.rows import row_blocks

_BLOCK = 32

Splitter = Callable[[np.ndarray, int], dict[str, np.ndarray]]


def stored_format(dtype: str) -> Format | None:
    """The Format of a checkpoint's stored type (`TensorRef.dtype`); None for one that Octavo cannot read."""
    found = _STORED.get(dtype)
    return None if found is None else found[0]


def require_stored_format(dtype: str, tensor: str) -> Format:
    """`stored_format`, or IncompatibleModelError naming the tensor and what to use instead."""
    found = stored_format(dtype)
    if found is None:
        raise IncompatibleModelError(
            f"{tensor} is stored as {dtype}, which Octavo cannot read",
            remedy=f"Use a file of this model in one of: {', '.join(sorted(_STORED))}.",
        )
    return found


def split_stored(dtype: str, raw: np.ndarray, columns: int) -> dict[str, np.ndarray]:
    """Raw rows of a checkpoint's tensor, as `TensorRef.read` gives them -> the arrays of its Format, exactly.

    Plain values are [N, columns] and come back as they are; GGUF's blocks are uint8 [N, bytes a row]. Raises
    ModelFormatError where a row has another width or a value, scale or minimum is not finite, and
    IncompatibleModelError for a type that cannot be read.
    """
    require_stored_format(dtype, "a tensor")
    return _STORED[dtype][1](raw, columns)


def _split_plain(format: Plain) -> Splitter:
    def split(raw: np.ndarray, columns: int) -> dict[str, np.ndarray]:
        if raw.dtype != STORED_DTYPES[format.dtype] or raw.shape[-1] != columns:
            raise ModelFormatError(
                f"rows of {columns} {format.dtype} values came as {raw.dtype} {list(raw.shape)}",
                remedy="The file is damaged: fetch it again.",
            )
        for block in row_blocks(raw.shape):
            require_finite(raw[block], format.dtype)
        return {"values": raw}

    return split


def _split_q8_0(raw: np.ndarray, columns: int) -> dict[str, np.ndarray]:
    blocks = _blocks(raw, columns, 34)
    scales = _float16(blocks[..., :2])
    codes = np.ascontiguousarray(blocks[..., 2:]).reshape(len(raw), columns).view(np.int8)
    return {"codes": codes, "scales": scales}


def _split_q4_1(raw: np.ndarray, columns: int) -> dict[str, np.ndarray]:
    blocks = _blocks(raw, columns, 20)
    codes = np.empty((len(raw), columns // 2), np.uint8)
    for rows in row_blocks((len(raw), columns)):
        halves = blocks[rows, :, 4:]
        in_order = np.concatenate((halves & 15, halves >> 4), axis=-1)
        codes[rows] = join_nibbles(in_order.reshape(len(in_order), columns))
    return {"codes": codes, "scales": _float16(blocks[..., :2]), "minimums": _float16(blocks[..., 2:4])}


def _blocks(raw: np.ndarray, columns: int, block_bytes: int) -> np.ndarray:
    """uint8 [N, bytes a row] -> [N, blocks, bytes a block]."""
    if columns % _BLOCK or raw.dtype != np.uint8 or raw.shape[1:] != (columns // _BLOCK * block_bytes,):
        raise ModelFormatError(
            f"rows of {columns} values in blocks of {_BLOCK} values and {block_bytes} bytes "
            f"came as {raw.dtype} {list(raw.shape)}",
            remedy="The file is damaged: fetch it again.",
        )
    return raw.reshape(len(raw), columns // _BLOCK, block_bytes)


def _float16(pairs: np.ndarray) -> np.ndarray:
    """uint8 [N, blocks, 2] -> float16 [N, blocks]."""
    values = np.ascontiguousarray(pairs).view(np.float16)[..., 0]
    require_finite(values, "f16")
    return values


_F32, _F16, _BF16 = Plain("f32"), Plain("f16"), Plain("bf16")

_STORED: Mapping[str, tuple[Format, Splitter]] = {
    "f32": (_F32, _split_plain(_F32)),
    "f16": (_F16, _split_plain(_F16)),
    "bf16": (_BF16, _split_plain(_BF16)),
    "q8_0": (Q8_0, _split_q8_0),
    "q4_1": (Q4_1, _split_q4_1),
}
