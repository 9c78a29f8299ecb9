"""How a group's scale is stored, and the exact float32 it stands for.

Flat scales are float16 or float32, one a group. Two-level ones are 8-bit whole numbers, each times a float16
that 256 columns share (ggml's K types): an eighth of a float32's bits. The product has at most 19 significant
bits, so float32 holds it exactly, and whoever computes with flat scales computes the same weights.
Shape letters: N output rows, K input columns, G group size; groups = ceil(K / G).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

ScaleStorage = Literal["f16", "f32", "u8*f16", "i8*f16"]

SCALE_DTYPES: Mapping[str, np.dtype[Any]] = {
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "u8*f16": np.dtype(np.uint8),
    "i8*f16": np.dtype(np.int8),
}
"""Of the array with one number a group."""

SUPER_COLUMNS = 256
"""Columns that share the float16 of a two-level scale."""


def is_two_level(storage: ScaleStorage) -> bool:
    return storage.endswith("*f16")


def require_known(known: bool, field: str, value: object) -> None:
    """Raises ValueError naming the field of a format that has a value none has."""
    if not known:
        raise ValueError(f"no format has {field} {value!r}")


def require_grouping(storage: ScaleStorage, group: int | None) -> None:
    """Raises ValueError for groups that no scales can have, or that these cannot."""
    require_known(storage in SCALE_DTYPES, "scales", storage)
    require_known(group is None or (type(group) is int and group > 0), "group_size", group)
    if is_two_level(storage) and (group is None or SUPER_COLUMNS % group):
        raise ValueError(f"two-level scales need groups that divide {SUPER_COLUMNS} columns")


def flat(
    storage: ScaleStorage, per_group: np.ndarray, per_super: np.ndarray | None, group: int
) -> np.ndarray:
    """float32 [N, groups], exact: `per_group` [N, groups], times `per_super` [N, ceil(K / 256)] if two-level."""
    values = per_group.astype(np.float32, copy=False)
    if not is_two_level(storage):
        return values
    assert per_super is not None
    shared = np.repeat(per_super.astype(np.float32), SUPER_COLUMNS // group, axis=1)
    return values * shared[:, : values.shape[1]]


def stored_bytes(storage: ScaleStorage, columns: int, groups: int) -> int:
    """Of the scales of one row."""
    supers = -(-columns // SUPER_COLUMNS) if is_two_level(storage) else 0
    return groups * SCALE_DTYPES[storage].itemsize + 2 * supers
