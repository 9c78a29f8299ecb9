"""Unquantized storage: f32, f16 or bf16 values, the last as uint16 bit patterns since numpy has no bfloat16.

A vector keeps its shape: its `values` are [N], not [N, 1]. Shape letters: N output rows, K input columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from octavo.errors import ModelFormatError
from octavo.quant.rows import row_blocks

PlainDtype = Literal["f32", "f16", "bf16"]

STORED_DTYPES: Mapping[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
}


@dataclass(frozen=True, slots=True)
class Plain:
    """Arrays: `values` [N, K] (or [N]) in `dtype`. weight = values, exactly."""

    dtype: PlainDtype

    def __post_init__(self) -> None:
        if self.dtype not in STORED_DTYPES:
            raise ValueError(f"no plain format is {self.dtype!r}")

    @property
    def name(self) -> str:
        return self.dtype

    def pack(self, weight: np.ndarray) -> dict[str, np.ndarray]:
        """float32 [N, K] or [N] -> values, rounded to nearest, ties to even.

        Raises ModelFormatError where a value is not finite, or would not be in `dtype`.
        """
        values = np.empty(weight.shape, STORED_DTYPES[self.dtype])
        for block in row_blocks(weight.shape):
            rows = weight[block]
            require_finite(rows, "f32")
            if self.dtype == "bf16":
                values[block] = to_bf16(rows)
            else:
                with np.errstate(over="ignore"):
                    values[block] = rows
            require_finite(values[block], self.dtype)
        return {"values": values}

    def unpack(self, packed: Mapping[str, np.ndarray], columns: int) -> np.ndarray:
        """float32 [N, columns] ([N] for a vector), exact; `values` themselves where they are float32."""
        values = packed["values"]
        assert values.shape[-1] == columns
        if self.dtype == "bf16":
            return from_bf16(values)
        return values.astype(np.float32, copy=False)

    def select_rows(
        self, packed: Mapping[str, np.ndarray], rows: np.ndarray | slice
    ) -> dict[str, np.ndarray]:
        return {"values": packed["values"][rows]}

    def nbytes(self, rows: int, columns: int) -> int:
        return rows * columns * STORED_DTYPES[self.dtype].itemsize

    def to_manifest(self) -> dict[str, Any]:
        return {"kind": "plain", "dtype": self.dtype}


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bit patterns of the nearest bfloat16, ties to even. NaN must not come in."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    half = (bits >> 16) & 1
    half += 0x7FFF
    half += bits  # cannot wrap: the largest finite or infinite pattern is 0xff800000
    half >>= 16
    return half.astype(np.uint16)


def from_bf16(values: np.ndarray) -> np.ndarray:
    """uint16 bit patterns -> float32, exact."""
    bits = values.astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def require_finite(values: np.ndarray, dtype: PlainDtype) -> None:
    """Raises ModelFormatError where a stored value is infinite or not a number."""
    # Infinities and NaN have all exponent bits set.
    finite = (values & 0x7F80) != 0x7F80 if dtype == "bf16" else np.isfinite(values)
    if not finite.all():
        raise ModelFormatError(
            f"{finite.size - np.count_nonzero(finite)} weights are infinite or not numbers in {dtype}",
            remedy="The checkpoint is broken: fetch it again, or use another.",
        )
