"""Affine storage: integer codes with a scale, and at times a zero or a minimum, for each group along a row.

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
from octavo.quant.scales import (
    JOINT,
    ScaleStorage,
    flat,
    is_two_level,
    joint_zeros,
    require_grouping,
    require_known,
    stored_bytes,
)

BITSANDBYTES_STEP = np.float32(7.874015718698502e-3)
"""bitsandbytes' 1/127, as its int8_vectorwise_dequant writes it."""

NIBBLE_ZERO = 8
"""The code that means 0 in 4 bits without a zero or minimum of their own."""


@dataclass(frozen=True, slots=True)
class Affine:
    """Arrays: `codes`, `scales` [N, groups], then by the fields below `zeros`, `minimums`, `super_scales`,
    `super_minimums` and `order`.

    `codes` are int8 [N, K] at 8 bits; at 4 bits uint8 [N, ceil(K / 2)], the even column in the low nibble, and
    the unused nibble of an odd K zero. All arithmetic is float32, rounded after each step, left to right:

    | scale_rule | zero    | weight                                                               |
    |------------|---------|----------------------------------------------------------------------|
    | step       | none    | code * scale; at 4 bits (code - 8) * scale                           |
    | step       | integer | (code - zero) * scale, `zeros` int8 [N, groups]                      |
    | step       | minimum | code * scale + minimum, `minimums` [N, groups] stored as the scales  |
    | absmax     | none    | code * scale * 7.874015718698502e-3 (1/127)                          |

    Joint scales ("f9z7", `octavo.quant.scales`) hold the minimum too, as minus scale * zero. Two-level scales are
    `scales` times `super_scales` float16 [N, ceil(K / 256)]; the minimum is then minus `minimums` times
    `super_minimums`. Whoever wants plain float32 numbers a group takes
    `flat_scales` and `flat_minimums`: code * scale + minimum is the same weight, to the bit but for integer
    zeros under float32 scales, where it may differ in the last one.
    """

    name: str
    bits: Literal[4, 8]
    group_size: int | None
    """None: one group a row."""
    zero: Literal["none", "integer", "minimum"]
    scales: ScaleStorage
    """Storage of scales and minimums."""
    scale_rule: Literal["step", "absmax"]
    rounding: rounding.RuleName | None
    """None: only checkpoints hold this format, nothing is packed to it."""
    ordered: bool = False
    """`order` int32 [K] says which input column each packed column is (GPTQ's act-order): groups run along
    the packed ones. The same for every row."""

    def __post_init__(self) -> None:
        require_known(self.bits in (4, 8), "bits", self.bits)
        require_known(self.zero in ("none", "integer", "minimum"), "zero", self.zero)
        require_known(self.scale_rule in ("step", "absmax"), "scale_rule", self.scale_rule)
        require_known(isinstance(self.ordered, bool), "ordered", self.ordered)
        require_grouping(self.scales, self.group_size)
        if self.scale_rule == "absmax" and (self.zero != "none" or self.bits != 8):
            raise ValueError("absmax scales are those of symmetric 8-bit codes")
        if self.scales == JOINT and self.zero != "minimum":
            raise ValueError(f"{JOINT} scales hold a minimum")
        if self.rounding == "search" and self.scales != JOINT:
            raise ValueError(f"the search makes {JOINT} scales, not {self.scales}")
        if self.rounding is not None and (self.rounding, self.zero) not in rounding.RULES:
            raise ValueError(f"{self.rounding} has no rule for codes with zero {self.zero!r}")

    def groups(self, columns: int) -> int:
        """How many groups a row of this many columns has."""
        return 1 if self.group_size is None else -(-columns // self.group_size)

    def pack(self, weight: np.ndarray) -> dict[str, np.ndarray]:
        """float32 [N, K] -> arrays, by the rule of `rounding`.

        Raises ModelFormatError where a weight is not finite or a scale overflows its storage, or where K is
        not a multiple of 32 for ggml's formats.
        """
        assert self.rounding is not None, f"nothing is packed to {self.name}"
        rows, columns = weight.shape
        groups = self.groups(columns)
        padded = groups * (self.group_size or columns)
        rule = rounding.RULES[self.rounding, self.zero]
        codes = np.empty((rows, self._code_columns(columns)), np.uint8 if self.bits == 4 else np.int8)
        packed = {"codes": codes}
        for block in row_blocks((rows, padded)):
            grouped = np.zeros((block.stop - block.start, padded), np.float32)
            grouped[:, :columns] = weight[block]
            grouped = grouped.reshape(len(grouped), groups, -1)
            for name, part in rule(grouped, columns).items():
                whole = packed.setdefault(name, np.empty((rows, part.shape[1]), part.dtype))
                whole[block] = part
            found = grouped.reshape(len(grouped), padded)[:, :columns]
            if self.bits == 4:
                codes[block] = join_nibbles(found.astype(np.uint8))
            else:
                np.copyto(codes[block], found, casting="unsafe")
        return packed

    def unpack(self, packed: Mapping[str, np.ndarray], columns: int) -> np.ndarray:
        """Arrays -> float32 [N, columns], bit-equal to the dequantizer of the library that defined the format."""
        codes, scales = packed["codes"], self.flat_scales(packed)
        groups = self.groups(columns)
        assert codes.shape[1] == self._code_columns(columns)
        assert scales.shape[1] == groups
        padded = groups * (self.group_size or columns)
        zeros = self._zeros(packed)
        minimums = self.flat_minimums(packed) if self.zero == "minimum" else None
        order = packed["order"] if self.ordered else slice(None)
        weight = np.empty((len(codes), columns), np.float32)
        for block in row_blocks((len(codes), padded)):
            values = np.zeros((block.stop - block.start, padded), np.float32)
            values[:, :columns] = split_nibbles(codes[block], columns) if self.bits == 4 else codes[block]
            grouped = values.reshape(len(values), groups, -1)
            if zeros is not None:
                grouped -= zeros[block, :, None]
            grouped *= scales[block, :, None]
            if self.scale_rule == "absmax":
                grouped *= BITSANDBYTES_STEP
            if minimums is not None:
                grouped += minimums[block, :, None]
            weight[block, order] = values[:, :columns]
        return weight

    def flat_scales(self, packed: Mapping[str, np.ndarray]) -> np.ndarray:
        """float32 [N, groups], exact."""
        return flat(self.scales, packed["scales"], packed.get("super_scales"), self.group_size or 0)

    def flat_minimums(self, packed: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """float32 [N, groups] such that weight = code * scale + minimum; None where code * scale is all."""
        if self.scales == JOINT:
            joint: np.ndarray = -joint_zeros(packed["scales"]) * self.flat_scales(packed)
            return joint
        zeros, minimums = self._zeros(packed), packed.get("minimums")
        if zeros is not None:
            products: np.ndarray = -zeros * self.flat_scales(packed)
            return products
        if minimums is None:
            return None
        stored = flat(self.scales, minimums, packed.get("super_minimums"), self.group_size or 0)
        if is_two_level(self.scales):
            np.negative(stored, out=stored)
        return stored

    def select_rows(
        self, packed: Mapping[str, np.ndarray], rows: np.ndarray | slice
    ) -> dict[str, np.ndarray]:
        return {name: array if name == "order" else array[rows] for name, array in packed.items()}

    def nbytes(self, rows: int, columns: int) -> int:
        groups = self.groups(columns)
        numbers = 2 if self.zero == "minimum" and self.scales != JOINT else 1
        per_row = self._code_columns(columns) + numbers * stored_bytes(self.scales, columns, groups)
        per_row += groups if self.zero == "integer" else 0
        return rows * per_row + (4 * columns if self.ordered else 0)

    def to_manifest(self) -> dict[str, Any]:
        return {"kind": "affine"} | asdict(self)

    def _code_columns(self, columns: int) -> int:
        return (columns + 1) // 2 if self.bits == 4 else columns

    def _zeros(self, packed: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """float32 [N, groups] of the codes that mean 0."""
        if self.zero == "integer":
            return packed["zeros"].astype(np.float32)
        if self.zero == "none" and self.bits == 4:
            return np.full(packed["scales"].shape, NIBBLE_ZERO, np.float32)
        return None


INT4 = Affine("int4", 4, 32, "minimum", "f9z7", "step", "search")
"""Ours: for each group the scale and zero of least squared error that a search finds, in 16 bits together: 4.5 bits
a weight."""

INT8 = Affine("int8", 8, 64, "none", "f16", "step", "stored-scale")
"""Ours: codes -127..127, the nearest to weight / scale for the scale as stored."""

LLM_INT8 = Affine("llm-int8", 8, None, "none", "f32", "absmax", "bitsandbytes")
"""What bitsandbytes' Linear8bitLt keeps (CB and SCB): weights cast to float16, then one absmax a row."""

Q4_0 = Affine("q4_0", 4, 32, "none", "f16", "step", None)
Q4_1 = Affine("q4_1", 4, 32, "minimum", "f16", "step", "ggml")
Q5_0 = Affine("q5_0", 8, 32, "none", "f16", "step", None)
Q5_1 = Affine("q5_1", 8, 32, "minimum", "f16", "step", None)
Q8_0 = Affine("q8_0", 8, 32, "none", "f16", "step", "ggml")
Q2_K = Affine("q2_k", 4, 16, "minimum", "u8*f16", "step", None)
Q3_K = Affine("q3_k", 4, 16, "none", "i8*f16", "step", None)
Q4_K = Affine("q4_k", 4, 32, "minimum", "u8*f16", "step", None)
Q5_K = Affine("q5_k", 8, 32, "minimum", "u8*f16", "step", None)
Q6_K = Affine("q6_k", 8, 16, "none", "i8*f16", "step", None)
"""ggml's, their numbers unchanged: 2- and 3-bit codes are kept in 4 bits, 5- and 6-bit ones in 8."""
