"""Layout `cuda-b64-1`: rows in order, columns padded with zeros to whole blocks of 64, so that tiles need no tail.

| codec      | codes                                                                  | scales              |
|------------|------------------------------------------------------------------------|---------------------|
| i8         | int8 [N, C], column c at byte c                                        | f16, f32 [N, groups] |
| u4         | uint8 [N, C / 2]: byte b of a 16-byte lane l holds column 32 l + b low | f16 [N, groups, 2]: |
|            | and 32 l + 16 + b high                                                 | scale, minimum      |
| f16 bf16 f32 | values [N, C]                                                        | none                |

What a matrix is stored as follows from its format alone (`encoding_of`); nothing here depends on a kernel's
tile. Shape letters: N output rows, K input columns, C = K rounded up to 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from octavo.models.parameters import Parameter
from octavo.quant.affine import BITSANDBYTES_STEP, Affine
from octavo.quant.format import Bundle, Format, Packed
from octavo.quant.nibbles import split_nibbles
from octavo.quant.plain import Plain
from octavo.quant.rows import row_blocks
from octavo.runners.bundles import VECTORS, bundle_name, padded_vector, part_name

COLUMN_BLOCK = 64

Codec = Literal["i8", "u4", "f16", "bf16", "f32"]

_CODE_BITS = {"i8": 8, "u4": 4, "f16": 16, "bf16": 16, "f32": 32}


@dataclass(frozen=True, slots=True)
class Encoding:
    """How kernels read a matrix, whatever its size."""

    codec: Codec
    group_size: int
    """Columns a scale covers; 0: one scale a row, or none where values are plain."""
    scales: Literal["none", "f16", "f32"]

    def groups(self, columns: int) -> int:
        """Scales, or pairs of scale and minimum, of a row."""
        return -(-padded(columns) // self.group_size) if self.group_size else 1

    def code_bytes(self, columns: int) -> int:
        """Of a row."""
        return padded(columns) * _CODE_BITS[self.codec] // 8

    def scale_bytes(self, columns: int) -> int:
        """Of a row."""
        if self.scales == "none":
            return 0
        return self.groups(columns) * (4 if self.codec == "u4" or self.scales == "f32" else 2)

    def row_bytes(self, columns: int) -> int:
        return self.code_bytes(columns) + self.scale_bytes(columns)


def encoding_of(format: Format) -> Encoding | None:
    """None: there are no kernels for this format."""
    if isinstance(format, Plain):
        return Encoding(format.dtype, 0, "none")
    if not isinstance(format, Affine) or format.ordered:
        return None
    scales = "f32" if format.scale_rule == "absmax" else format.scales
    if scales != "f16" and scales != "f32":
        return None
    if format.bits == 8 and format.zero == "none" and format.group_size in (None, 32, 64):
        return Encoding("i8", format.group_size or 0, scales)
    if format.bits == 4 and format.zero == "minimum" and format.group_size in (32, 64, 128):
        return Encoding("u4", format.group_size, "f16") if scales == "f16" else None
    return None


def padded(columns: int) -> int:
    return -(-columns // COLUMN_BLOCK) * COLUMN_BLOCK


@dataclass(frozen=True, slots=True)
class CudaLayout:
    """A layer's q, k, v and its gate, up are bundled: on the device they lie one under the other."""

    id: str = "cuda-b64-1"

    def bundles(self, parameters: Sequence[Parameter]) -> tuple[Bundle, ...]:
        by_name: dict[str, list[Parameter]] = {}
        for parameter in parameters:
            by_name.setdefault(bundle_name(parameter), []).append(parameter)
        return tuple(Bundle(name, tuple(members)) for name, members in by_name.items())

    def arrange(self, bundle: Bundle, packed: Sequence[tuple[Format, Packed]]) -> dict[str, np.ndarray]:
        if bundle.name == VECTORS:
            return {VECTORS: np.concatenate([padded_vector(arrays["values"]) for _, arrays in packed])}
        arranged: dict[str, np.ndarray] = {}
        for parameter, (chosen, arrays) in zip(bundle.parameters, packed, strict=True):
            for name, array in _matrix(chosen, arrays, parameter.shape[1]).items():
                arranged[f"{part_name(parameter)}_{name}"] = array
        return arranged


CUDA_B64 = CudaLayout()


def _matrix(format: Format, arrays: Packed, columns: int) -> dict[str, np.ndarray]:
    """`codes` and, where there are any, `scales`."""
    encoding = encoding_of(format)
    assert encoding is not None, f"{format.name} was declined"
    if isinstance(format, Plain):
        return {"codes": _pad_columns(arrays["values"], padded(columns))}
    assert isinstance(format, Affine)
    scales = arrays["scales"]
    if format.scale_rule == "absmax":
        scales = scales * BITSANDBYTES_STEP
    if encoding.group_size:
        scales = _pad_columns(scales, encoding.groups(columns))
    if encoding.codec == "i8":
        return {"codes": _pad_columns(arrays["codes"], padded(columns)), "scales": scales}
    minimums = _pad_columns(arrays["minimums"], scales.shape[1])
    return {
        "codes": _lanes_of_nibbles(arrays["codes"], columns),
        "scales": np.stack((scales, minimums), axis=-1),
    }


def _pad_columns(array: np.ndarray, width: int) -> np.ndarray:
    """The array itself where it has that many columns."""
    if array.shape[1] == width:
        return array
    out = np.zeros((len(array), width), array.dtype)
    out[:, : array.shape[1]] = array
    return out


def _lanes_of_nibbles(codes: np.ndarray, columns: int) -> np.ndarray:
    """Logical nibbles [N, ceil(K / 2)] -> uint8 [N, C / 2] as the table says."""
    out = np.empty((len(codes), padded(columns) // 2), np.uint8)
    for rows in row_blocks((len(codes), padded(columns))):
        values = _pad_columns(split_nibbles(codes[rows], columns), padded(columns))
        halves = values.reshape(len(values), -1, 2, 16)
        out[rows] = (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(len(values), -1)
    return out
