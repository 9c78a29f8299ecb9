"""Codebook storage: each weight is an entry of a fixed table times its group's scale.

bitsandbytes' nf4 and fp4, ggml's iq4 types and 8-bit floats are all this. Shape letters: N output rows, K input
columns, G group size; groups = ceil(K / G), the last one may be short.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from octavo.errors import ModelFormatError
from octavo.quant.nibbles import join_nibbles, split_nibbles
from octavo.quant.rows import row_blocks
from octavo.quant.scales import JOINT, ScaleStorage, flat, require_grouping, require_known, stored_bytes
from octavo.quant.tables import TABLES, TableName


@dataclass(frozen=True, slots=True)
class Codebook:
    """Arrays: `codes`, `scales` [N, groups]; two-level also `super_scales` float16 [N, ceil(K / 256)].

    weight = table[code] * scale, in float32, rounded once. `codes` are uint8 [N, K] at 8 bits; at 4 bits uint8
    [N, ceil(K / 2)], the even column in the low nibble, the unused nibble of an odd K zero.
    """

    name: str
    table: TableName
    group_size: int | None
    """None: one group a row."""
    scales: ScaleStorage
    rounding: Literal["bitsandbytes"] | None
    """None: only checkpoints hold this format, nothing is packed to it."""

    def __post_init__(self) -> None:
        require_known(self.table in TABLES, "table", self.table)
        require_known(self.rounding in ("bitsandbytes", None), "rounding", self.rounding)
        require_known(self.scales != JOINT, "scales", self.scales)
        require_grouping(self.scales, self.group_size)

    @property
    def bits(self) -> Literal[4, 8]:
        return 4 if len(self.values) == 16 else 8

    @property
    def values(self) -> np.ndarray:
        """The table: float32 [16] or [256]."""
        return TABLES[self.table]

    def groups(self, columns: int) -> int:
        """How many groups a row of this many columns has."""
        return 1 if self.group_size is None else -(-columns // self.group_size)

    def pack(self, weight: np.ndarray) -> dict[str, np.ndarray]:
        """float32 [N, K] -> arrays, as bitsandbytes' quantize_4bit: the scale is the group's absmax, the code the
        table's nearest entry, the lower one halfway between two.

        bitsandbytes cuts the flattened matrix into groups; the arrays are its own where K is a multiple of G,
        and elsewhere each row ends in a short group. Raises ModelFormatError where a weight is not finite.
        """
        assert self.rounding == "bitsandbytes", f"nothing is packed to {self.name}"
        assert self.bits == 4
        rows, columns = weight.shape
        groups = self.groups(columns)
        padded = groups * (self.group_size or columns)
        ascending = np.argsort(self.values, kind="stable").astype(np.uint8)
        entries = self.values[ascending]
        midpoints = (entries[:-1] + entries[1:]) / 2
        codes = np.empty((rows, self._code_columns(columns)), np.uint8)
        scales = np.empty((rows, groups), np.float32)
        for block in row_blocks((rows, padded)):
            grouped = np.zeros((block.stop - block.start, padded), np.float32)
            grouped[:, :columns] = weight[block]
            grouped = grouped.reshape(len(grouped), groups, -1)
            largest = np.abs(grouped).max(axis=-1)
            if not np.isfinite(largest).all():
                raise ModelFormatError(
                    "a weight is infinite or not a number",
                    remedy="The checkpoint is broken: fetch it again, or use another.",
                )
            scales[block] = largest
            grouped *= (1 / np.maximum(largest, np.float32(1e-38)))[..., None]
            np.clip(grouped, -1, 1, out=grouped)
            nearest = ascending[
                np.searchsorted(midpoints, grouped.reshape(len(grouped), padded)[:, :columns])
            ]
            codes[block] = join_nibbles(nearest)
        return {"codes": codes, "scales": scales}

    def unpack(self, packed: Mapping[str, np.ndarray], columns: int) -> np.ndarray:
        """Arrays -> float32 [N, columns], bit-equal to the dequantizer of the library that defined the format."""
        codes, scales = packed["codes"], self.flat_scales(packed)
        groups = self.groups(columns)
        assert codes.shape[1] == self._code_columns(columns)
        assert scales.shape[1] == groups
        padded = groups * (self.group_size or columns)
        weight = np.empty((len(codes), columns), np.float32)
        for block in row_blocks((len(codes), padded)):
            chosen = split_nibbles(codes[block], columns) if self.bits == 4 else codes[block]
            values = np.zeros((len(chosen), padded), np.float32)
            values[:, :columns] = self.values[chosen]
            values.reshape(len(values), groups, -1)[...] *= scales[block, :, None]
            weight[block] = values[:, :columns]
        return weight

    def flat_scales(self, packed: Mapping[str, np.ndarray]) -> np.ndarray:
        """float32 [N, groups], exact."""
        return flat(self.scales, packed["scales"], packed.get("super_scales"), self.group_size or 0)

    def select_rows(
        self, packed: Mapping[str, np.ndarray], rows: np.ndarray | slice
    ) -> dict[str, np.ndarray]:
        return {name: array[rows] for name, array in packed.items()}

    def nbytes(self, rows: int, columns: int) -> int:
        groups = self.groups(columns)
        return rows * (self._code_columns(columns) + stored_bytes(self.scales, columns, groups))

    def to_manifest(self) -> dict[str, Any]:
        return {"kind": "codebook"} | asdict(self)

    def _code_columns(self, columns: int) -> int:
        return (columns + 1) // 2 if self.bits == 4 else columns


NF4 = Codebook("nf4", "nf4", 64, "f32", "bitsandbytes")
"""bitsandbytes' 4-bit NormalFloat in blocks of 64, its default."""

IQ4_NL = Codebook("iq4_nl", "iq4", 32, "f16", None)
IQ4_XS = Codebook("iq4_xs", "iq4", 32, "i8*f16", None)
"""ggml's, their numbers unchanged."""
