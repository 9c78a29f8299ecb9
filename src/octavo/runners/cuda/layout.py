"""Layout `cuda-b64-1`: rows in order, columns padded to whole blocks of 64, so that tiles need no tail.

| codec        | codes                                                                    | weight                 |
|--------------|--------------------------------------------------------------------------|------------------------|
| i8           | int8 [N, C], column c at byte c                                          | code * scale           |
| i8m          | the same                                                                 | code * scale + minimum |
| e4m3         | the same bytes, 8-bit floats                                             | float * scale          |
| u4           | uint8 [N, C / 2]: byte b of a 16-byte lane l holds column 32 l + b low   | code * scale + minimum |
|              | and 32 l + 16 + b high                                                   |                        |
| i4           | the same, code - 8 in two's complement                                   | (code - 8) * scale     |
| nf4 fp4 iq4  | byte 4 i + 2 h + p of a lane holds column 32 l + 16 h + 4 i + 2 p low    | table[code] * scale    |
|              | and the next one high: four codes in 16 bits are a byte permute's selector |                      |
| f16 bf16 f32 | values [N, C]                                                            | value                  |

Scales are f16 or f32 [N, groups], with a minimum [N, groups, 2]. Two-level ones are a record of bytes for each row:
what 256 columns share, f16 [ceil(C / 256)], then 8-bit numbers [groups], both with their minimum's beside them where
there is one, zeros up to a multiple of 4. The shared minimum has the sign with which it is added. f9z7 words, which
hold a scale and a zero, stay as they are: int16 [N, groups].

What a matrix is stored as follows from its format alone (`encoding_of`); nothing here depends on a kernel's
tile. Padding has code 0, which a minimum or a table makes a weight: activations are zero there.
Shape letters: N output rows, K input columns, C = K rounded up to 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from octavo.models.parameters import Parameter
from octavo.quant.affine import BITSANDBYTES_STEP, NIBBLE_ZERO, Affine
from octavo.quant.codebook import Codebook
from octavo.quant.format import Bundle, Format, Packed
from octavo.quant.nibbles import split_nibbles
from octavo.quant.plain import Plain
from octavo.quant.rows import row_blocks
from octavo.quant.scales import SUPER_COLUMNS, ScaleStorage, is_two_level
from octavo.runners.bundles import VECTORS, bundle_name, padded_vector, part_name

COLUMN_BLOCK = 64

Codec = Literal["i8", "i8m", "e4m3", "u4", "i4", "nf4", "fp4", "iq4", "f16", "bf16", "f32"]

CODE_BITS: dict[Codec, int] = {
    **{"i8": 8, "i8m": 8, "e4m3": 8},
    **{"u4": 4, "i4": 4, "nf4": 4, "fp4": 4, "iq4": 4},
    **{"f16": 16, "bf16": 16, "f32": 32},
}

_AFFINE_CODECS: dict[tuple[int, bool], Codec] = {
    (8, False): "i8",
    (8, True): "i8m",
    (4, False): "i4",
    (4, True): "u4",
}


@dataclass(frozen=True, slots=True)
class Encoding:
    """How kernels read a matrix, whatever its size."""

    codec: Codec
    group_size: int
    """Columns a scale covers; 0: one scale a row, or none where values are plain."""
    scales: ScaleStorage | Literal["none"]

    @property
    def has_minimums(self) -> bool:
        return self.codec in ("i8m", "u4")

    @property
    def takes_values(self) -> bool:
        """Whether activations are multiplied as floats, not in fixed point: weights that are no integers."""
        return self.codec in ("f16", "bf16", "f32", "e4m3")

    @property
    def is_int8(self) -> bool:
        """Whether integer products take it: signed bytes, with a scale a row or for whole blocks of 32 columns."""
        return self.codec == "i8" and self.scales in ("f16", "f32") and self.group_size % 32 == 0

    def groups(self, columns: int) -> int:
        """Scales, or pairs of scale and minimum, of a row."""
        return -(-padded(columns) // self.group_size) if self.group_size else 1

    def code_bytes(self, columns: int) -> int:
        """Of a row."""
        return padded(columns) * CODE_BITS[self.codec] // 8

    def scale_bytes(self, columns: int) -> int:
        """Of a row."""
        if self.scales == "none":
            return 0
        if self.scales == "f9z7":
            return 2 * self.groups(columns)
        each = 2 if self.has_minimums else 1
        if is_two_level(self.scales):
            record = each * (2 * -(-padded(columns) // SUPER_COLUMNS) + self.groups(columns))
            return -(-record // 4) * 4
        return each * self.groups(columns) * (4 if self.scales == "f32" else 2)

    def row_bytes(self, columns: int) -> int:
        return self.code_bytes(columns) + self.scale_bytes(columns)


def encoding_of(format: Format) -> Encoding | None:
    """None: there are no kernels for this format."""
    if isinstance(format, Plain):
        return Encoding(format.dtype, 0, "none")
    if isinstance(format, Affine):
        codec = _AFFINE_CODECS[format.bits, format.zero != "none"]
        # What is computed when packed is not exact in less: a 127th of a scale, a zero times it.
        exact = format.scale_rule == "step" and format.zero != "integer"
        scales = format.scales if exact else "f32"
    elif isinstance(format, Codebook):
        codec, scales = format.table, format.scales
    else:
        return None
    if isinstance(format, Affine) and format.ordered:
        return None
    # A lane of 16 bytes has one scale, or one for each of its two blocks of 16 columns.
    group = format.group_size or 0
    if group % (128 // CODE_BITS[codec]) and group != 16:
        return None
    return Encoding(codec, group, scales)


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
    assert isinstance(format, Affine | Codebook)
    codes = arrays["codes"]
    if CODE_BITS[encoding.codec] == 8:
        codes = _pad_columns(codes, padded(columns))
    else:
        codes = _lanes_of_nibbles(codes, columns, encoding.codec)
    return {"codes": codes, "scales": _scales(format, arrays, encoding, columns)}


def _scales(format: Affine | Codebook, arrays: Packed, encoding: Encoding, columns: int) -> np.ndarray:
    """[N, groups], [N, groups, 2], or uint8 [N, bytes of a record]."""
    groups = encoding.groups(columns)
    if encoding.scales == "f9z7":
        return _pad_columns(arrays["scales"], groups).view(np.int16)
    if is_two_level(format.scales):
        names = ("scales", "minimums") if encoding.has_minimums else ("scales",)
        supers = -(-padded(columns) // SUPER_COLUMNS)
        shared = [_pad_columns(arrays[f"super_{name}"], supers) for name in names]
        if encoding.has_minimums:
            shared[1] = -shared[1]
        parts = [
            np.stack(pair, axis=-1).reshape(len(pair[0]), -1).view(np.uint8)
            for pair in (shared, [_pad_columns(arrays[name], groups) for name in names])
        ]
        return _pad_columns(np.concatenate(parts, axis=1), encoding.scale_bytes(columns))
    dtype = np.float16 if encoding.scales == "f16" else np.float32
    scales = format.flat_scales(arrays)
    minimums = None
    if isinstance(format, Affine):
        minimums = format.flat_minimums(arrays) if encoding.has_minimums else None
        if format.scale_rule == "absmax":
            scales = scales * BITSANDBYTES_STEP
    scales = _pad_columns(scales.astype(dtype), groups)
    if minimums is None:
        return scales
    return np.stack((scales, _pad_columns(minimums.astype(dtype), groups)), axis=-1)


def _pad_columns(array: np.ndarray, width: int) -> np.ndarray:
    """The array itself where it has that many columns."""
    if array.shape[1] == width:
        return array
    out = np.zeros((len(array), width), array.dtype)
    out[:, : array.shape[1]] = array
    return out


def _lanes_of_nibbles(codes: np.ndarray, columns: int, codec: Codec) -> np.ndarray:
    """Logical nibbles [N, ceil(K / 2)] -> uint8 [N, C / 2] as the table says."""
    out = np.empty((len(codes), padded(columns) // 2), np.uint8)
    for rows in row_blocks((len(codes), padded(columns))):
        values = split_nibbles(codes[rows], columns)
        if codec == "i4":
            values = values ^ np.uint8(NIBBLE_ZERO)
        lanes = _pad_columns(values, padded(columns)).reshape(len(values), -1, 2, 16)
        if codec in ("u4", "i4"):
            low, high = lanes[:, :, 0], lanes[:, :, 1]
        else:
            quads = lanes.reshape(*lanes.shape[:2], 2, 4, 2, 2).transpose(0, 1, 3, 2, 4, 5)  # i, h, p, nibble
            low, high = quads[..., 0], quads[..., 1]
        out[rows] = (low | (high << 4)).reshape(len(values), -1)
    return out
