"""How a group's scale is stored, and the exact float32 it stands for.

Flat scales are float16 or float32, one a group. Two-level ones are 8-bit whole numbers, each times a float16
that 256 columns share (ggml's K types): an eighth of a float32's bits. The product has at most 19 significant
bits, so float32 holds it exactly, and whoever computes with flat scales computes the same weights. Joint ones
hold a scale and a zero in one 16-bit word, with nothing shared beside it.
Shape letters: N output rows, K input columns, G group size; groups = ceil(K / G).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

ScaleStorage = Literal["f16", "f32", "u8*f16", "i8*f16", "f9z7"]

SCALE_DTYPES: Mapping[str, np.dtype[Any]] = {
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "u8*f16": np.dtype(np.uint8),
    "i8*f16": np.dtype(np.int8),
    "f9z7": np.dtype(np.uint16),
}
"""Of the array with one number a group."""

SUPER_COLUMNS = 256
"""Columns that share the float16 of a two-level scale."""

JOINT: ScaleStorage = "f9z7"
"""Bits 0 to 8 of a word: the scale, 5 of exponent and 4 of mantissa, 2**(e - 22) * (1 + m / 16). Bits 9 to 15: the
zero in eighths of a code. weight = scale * (code - zero), which float32 holds exactly."""

_JOINT_BITS = np.uint32(105 << 23)
"""Added to a scale's bits where float32 has its exponent and mantissa: 105 = 127 - 22."""

LARGEST_JOINT_SCALE = 2.0**9 * (1 + 15 / 16)


def is_two_level(storage: ScaleStorage) -> bool:
    return storage.endswith("*f16")


def joint_scales(words: np.ndarray) -> np.ndarray:
    """float32, of joint words or of the places 0 to 511 of their scales, in ascending order."""
    bits = (words.astype(np.uint32) & np.uint32(511)) << np.uint32(19)
    return (bits + _JOINT_BITS).view(np.float32)


def joint_zeros(words: np.ndarray) -> np.ndarray:
    """float32, of joint words: the code that means 0, a multiple of an eighth."""
    zeros: np.ndarray = (words >> 9).astype(np.float32) / np.float32(8)
    return zeros


def nearest_joint_scale(scales: np.ndarray) -> np.ndarray:
    """float32, above 0 -> int64, the place of the nearest scale that a joint word can hold."""
    rounded = scales.view(np.uint32).astype(np.int64) + (1 << 18)
    places: np.ndarray = np.clip((rounded >> 19) - (105 << 4), 0, 511)
    return places


def join_scale_and_zero(places: np.ndarray, eighths: np.ndarray) -> np.ndarray:
    """Places 0 to 511 of scales and zeros in eighths 0 to 127 -> uint16 words."""
    return (places.astype(np.uint16) | eighths.astype(np.uint16) << np.uint16(9)).astype(np.uint16)


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
    if storage == JOINT:
        return joint_scales(per_group)
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
