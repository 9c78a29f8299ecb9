"""int4's rounding: for each group the scale and zero, as they are stored, whose 4-bit codes have the least squared
error found.

From nine starts (either end of the group's range drawn in by 0, 10 or 20 %), codes and then the line that fits
them best are found in turn, three times (Lloyd's algorithm on a straight line; llama.cpp's make_qkx2_quants
searches the same space otherwise). Around the best line every scale and zero that can be stored nearby is tried.
Shape letters: n rows, G group size.
"""

from __future__ import annotations

import numpy as np

from octavo.errors import ModelFormatError
from octavo.quant.scales import LARGEST_JOINT_SCALE, join_scale_and_zero, joint_scales, nearest_joint_scale

_SHARES = (1.0, 0.9, 0.8)
"""Of each end of a group's range at a start; lower ones won nothing on the default model."""
_ROUNDS = 3
_NEARBY_SCALES = (-2, -1, 0, 1, 2)
_NEARBY_ZEROS = (-1, 0, 1)
_MOST = np.float32(15)
_EIGHTHS = np.float32(8)
_LAST_ZERO = np.float32(127 / 8)
_TINY = np.float32(1e-30)
_WIDEST = 15 * LARGEST_JOINT_SCALE


def search_scales(grouped: np.ndarray, columns: int) -> dict[str, np.ndarray]:
    """float32 [n, groups, G] -> `scales` as "f9z7" stores them; `grouped` becomes the codes.

    Raises ModelFormatError where a weight is not finite or too large for such a scale.
    """
    least = np.minimum(grouped.min(axis=-1), 0)
    largest = np.maximum(grouped.max(axis=-1), 0)
    if not (np.isfinite(least).all() and np.isfinite(largest).all()):
        raise ModelFormatError(
            "a weight is infinite or not a number",
            remedy="The checkpoint is broken: fetch it again, or use another.",
        )
    # Halves, since the difference itself may be infinite.
    if (largest / 2 - least / 2).max(initial=0) > _WIDEST / 2:
        raise ModelFormatError(
            f"weights of one group are further apart than int4's scales reach ({_WIDEST:.0f})",
            remedy="Use --quant int8 or --quant none.",
        )
    scales, zeros = _as_stored(grouped, *_best_line(grouped, least, largest))
    words = join_scale_and_zero(scales, zeros)
    _encode(grouped, joint_scales(words), zeros / _EIGHTHS, grouped)
    return {"scales": words}


def _best_line(values: np.ndarray, least: np.ndarray, largest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zeros, float32 [n, groups]: weight = scale * (code - zero)."""
    size = np.float32(values.shape[-1])
    total = values.sum(axis=-1)
    codes = np.empty_like(values)
    best_error = np.full(least.shape, np.inf, np.float32)
    best_scale, best_zero = np.full_like(least, _TINY), np.zeros_like(least)
    for low in _SHARES:
        for high in _SHARES:
            depth = least * np.float32(-low)
            scale = np.maximum((largest * np.float32(high) + depth) / _MOST, _TINY)
            zero = depth / scale
            for _ in range(_ROUNDS):
                _encode(values, scale, zero, codes)
                sums = codes.sum(axis=-1)
                squares = np.einsum("ngk,ngk->ng", codes, codes)
                products = np.einsum("ngk,ngk->ng", codes, values)
                spread = size * squares - sums * sums
                slope = (size * products - sums * total) / np.maximum(spread, 1)
                fits = (spread > 0) & (slope > _TINY)
                zero = np.where(fits, (sums - total / np.where(fits, slope, 1)) / size, zero)
                np.clip(zero, 0, _LAST_ZERO, out=zero)
                # The best slope through the zero that can be stored; through any other it is the same as above.
                length = squares + zero * (size * zero - 2 * sums)
                slope = (products - zero * total) / np.maximum(length, _TINY)
                scale = np.where(fits & (slope > _TINY), slope, scale)
            _encode(values, scale, zero, codes)
            error = _squared_error(values, codes, scale, zero)
            better = error < best_error
            best_error = np.where(better, error, best_error)
            best_scale = np.where(better, scale, best_scale)
            best_zero = np.where(better, zero, best_zero)
    return best_scale, best_zero


def _as_stored(values: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of stored scales and zeros in eighths near a line, [n, groups]: those of least error."""
    size = np.float32(values.shape[-1])
    total = values.sum(axis=-1)
    codes = np.empty_like(values)
    nearest = nearest_joint_scale(scales)
    best_error = np.full(scales.shape, np.inf, np.float32)
    best_place, best_zero = nearest, np.zeros_like(scales)
    for step in _NEARBY_SCALES:
        place = np.clip(nearest + step, 0, 511)
        scale = joint_scales(place)
        _encode(values, scale, zeros, codes)
        middle = np.rint((codes.sum(axis=-1) - total / scale) / size * _EIGHTHS)
        for shift in _NEARBY_ZEROS:
            zero = np.clip(middle + np.float32(shift), 0, 127)
            _encode(values, scale, zero / _EIGHTHS, codes)
            error = _squared_error(values, codes, scale, zero / _EIGHTHS)
            better = error < best_error
            best_error = np.where(better, error, best_error)
            best_place = np.where(better, place, best_place)
            best_zero = np.where(better, zero, best_zero)
    return best_place, best_zero


def _encode(values: np.ndarray, scales: np.ndarray, zeros: np.ndarray, out: np.ndarray) -> None:
    """The nearest of 16 codes on each group's line."""
    np.multiply(values, (1 / scales)[..., None], out=out)
    out += zeros[..., None]
    np.rint(out, out=out)
    np.clip(out, 0, _MOST, out=out)


def _squared_error(
    values: np.ndarray, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray
) -> np.ndarray:
    """[n, groups]; `codes` are overwritten."""
    codes -= zeros[..., None]
    codes *= scales[..., None]
    codes -= values
    error: np.ndarray = np.einsum("ngk,ngk->ng", codes, codes)
    return error
