"""Affine storage: integer codes with a scale, and at times a minimum, for each group along a row.

The fields say how arrays become weights, which is all a runner needs; `rounding` says how weights become
codes (`octavo.quant.rounding`). The named instances are the formats a user or a checkpoint can name.
Shape letters: N output rows, K input columns, G group size; groups = ceil(K / G), the last one may be short.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from octavo.quant import rounding
from octavo.quant.nibbles import join_nibbles, split_nibbles
from octavo.quant.rows import row_blocks

BITSANDBYTES_STEP = np.float32(7.874015718698502e-3)
"""bitsandbytes' 1/127, as its int8_vectorwise_dequant writes it."""

_SCALES: Mapping[str, np.dtype[Any]] = {"f16": np.dtype(np.float16), "f32": np.dtype(np.float32)}


@dataclass(frozen=True, slots=True)
class Affine:
    """Arrays: `codes`, `scales` [N, groups] and, where `zero` is "minimum", `minimums` [N, groups].

    `codes` are int8 [N, K] at 8 bits; at 4 bits uint8 [N, ceil(K / 2)], the even column in the low nibble, and
    the unused nibble of an odd K zero. All arithmetic is float32, rounded after each step, left to right:

    | scale_rule | zero    | weight                                     |
    |------------|---------|--------------------------------------------|
    | step       | none    | code * scale                               |
    | step       | minimum | code * scale + minimum                     |
    | absmax     | none    | code * scale * 7.874015718698502e-3 (1/127) |
    """

    name: str
    bits: Literal[4, 8]
    group_size: int | None
    """None: one group a row."""
    zero: Literal["none", "minimum"]
    scales: Literal["f16", "f32"]
    """Storage of scales and minimums."""
    scale_rule: Literal["step", "absmax"]
    rounding: Literal["stored-scale", "bitsandbytes", "ggml"]

    def __post_init__(self) -> None:
        if self.bits == 4 and self.zero == "none":
            raise ValueError("4-bit codes are unsigned: they need a minimum")
        if self.scale_rule == "absmax" and self.zero != "none":
            raise ValueError("absmax scales are symmetric: they take no minimum")

    def groups(self, columns: int) -> int:
        """How many groups a row of this many columns has."""
        return 1 if self.group_size is None else -(-columns // self.group_size)

    def pack(self, weight: np.ndarray) -> dict[str, np.ndarray]:
        """float32 [N, K] -> arrays, by the rule of `rounding`.

        Raises ModelFormatError where a weight is not finite or a scale overflows its storage, or where K is
        not a multiple of 32 for ggml's formats.
        """
        rows, columns = weight.shape
        groups = self.groups(columns)
        padded = groups * (self.group_size or columns)
        rule = rounding.RULES[self.rounding, self.zero]
        codes = np.empty((rows, self._code_columns(columns)), np.uint8 if self.bits == 4 else np.int8)
        scales = np.empty((rows, groups), _SCALES[self.scales])
        minimums = np.empty_like(scales) if self.zero == "minimum" else None
        for block in row_blocks((rows, padded)):
            grouped = np.zeros((block.stop - block.start, padded), np.float32)
            grouped[:, :columns] = weight[block]
            grouped = grouped.reshape(len(grouped), groups, -1)
            scales[block], least = rule(grouped, columns)
            if minimums is not None:
                minimums[block] = least
            whole = grouped.reshape(len(grouped), padded)[:, :columns]
            if self.bits == 4:
                codes[block] = join_nibbles(whole.astype(np.uint8))
            else:
                np.copyto(codes[block], whole, casting="unsafe")
        packed = {"codes": codes, "scales": scales}
        return packed if minimums is None else packed | {"minimums": minimums}

    def unpack(self, packed: Mapping[str, np.ndarray], columns: int) -> np.ndarray:
        """Arrays -> float32 [N, columns], bit-equal to the dequantizer of the library that defined the format."""
        codes, scales = packed["codes"], packed["scales"]
        groups = self.groups(columns)
        assert codes.shape[1] == self._code_columns(columns)
        assert scales.shape[1] == groups
        padded = groups * (self.group_size or columns)
        weight = np.empty((len(codes), columns), np.float32)
        for block in row_blocks((len(codes), padded)):
            values = np.zeros((block.stop - block.start, padded), np.float32)
            values[:, :columns] = split_nibbles(codes[block], columns) if self.bits == 4 else codes[block]
            grouped = values.reshape(len(values), groups, -1)
            grouped *= scales[block, :, None].astype(np.float32)
            if self.scale_rule == "absmax":
                grouped *= BITSANDBYTES_STEP
            if self.zero == "minimum":
                grouped += packed["minimums"][block, :, None].astype(np.float32)
            weight[block] = values[:, :columns]
        return weight

    def select_rows(
        self, packed: Mapping[str, np.ndarray], rows: np.ndarray | slice
    ) -> dict[str, np.ndarray]:
        return {name: array[rows] for name, array in packed.items()}

    def nbytes(self, rows: int, columns: int) -> int:
        per_group = _SCALES[self.scales].itemsize * (2 if self.zero == "minimum" else 1)
        return rows * (self._code_columns(columns) + self.groups(columns) * per_group)

    def to_manifest(self) -> dict[str, Any]:
        return {"kind": "affine"} | asdict(self)

    def _code_columns(self, columns: int) -> int:
        return (columns + 1) // 2 if self.bits == 4 else columns


INT8 = Affine("int8", 8, 64, "none", "f16", "step", "stored-scale")
"""Ours: codes -127..127, the nearest to weight / scale for the scale as stored."""

LLM_INT8 = Affine("llm-int8", 8, None, "none", "f32", "absmax", "bitsandbytes")
"""What bitsandbytes' Linear8bitLt keeps (CB and SCB): weights cast to float16, then one absmax a row."""

Q8_0 = Affine("q8_0", 8, 32, "none", "f16", "step", "ggml")
Q4_1 = Affine("q4_1", 4, 32, "minimum", "f16", "step", "ggml")
