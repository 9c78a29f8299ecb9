"""int4's rounding: for each group the scale and minimum whose 4-bit codes have the least squared error found.

From nine starts (either end of the group's range drawn in by 0, 10 or 20 %), codes and then the line that fits
them best are found in turn, three times (Lloyd's algorithm on a straight line; llama.cpp's make_qkx2_quants
searches the same space otherwise). The best is stored in two levels and the codes are made for it as stored.
Shape letters: n rows, G group size.
"""

from __future__ import annotations

import numpy as np

from octavo.errors import ModelFormatError
from octavo.quant.scales import SUPER_COLUMNS

_SHARES = (1.0, 0.9, 0.8)
"""Of each end of a group's range at a start; lower ones won nothing on the default model."""
_ROUNDS = 3
_MOST = np.float32(15)
_TINY = np.float32(1e-30)
_LARGEST = 255 * 65504.0


def search_scales(grouped: np.ndarray, columns: int) -> dict[str, np.ndarray]:
    """float32 [n, groups, G] -> uint8 scales and minimums and their float16; `grouped` becomes the codes.

    Minimums are never above 0. Raises ModelFormatError where a weight is not finite or too large for float16.
    """
    size = grouped.shape[-1]
    least = np.minimum(grouped.min(axis=-1), 0)
    largest = grouped.max(axis=-1)
    if not (np.isfinite(least).all() and np.isfinite(largest).all()):
        raise ModelFormatError(
            "a weight is infinite or not a number",
            remedy="The checkpoint is broken: fetch it again, or use another.",
        )
    if max(largest.max(initial=0), -least.min(initial=0)) > _LARGEST:
        raise ModelFormatError(
            f"a weight is beyond what int4's float16 scales can hold ({_LARGEST:.3g})",
            remedy="Use --quant none.",
        )
    scales, depths = _best(grouped, least, largest)
    supers = SUPER_COLUMNS // size
    scale_codes, super_scales, scales = _two_level(scales, supers)
    depth_codes, super_depths, depths = _two_level(depths, supers)
    _encode(grouped, scales, depths, grouped)
    return {
        "scales": scale_codes,
        "super_scales": super_scales,
        "minimums": depth_codes,
        "super_minimums": super_depths,
    }


def _best(values: np.ndarray, least: np.ndarray, largest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and depths (minus minimums), float32 [n, groups]."""
    size = np.float32(values.shape[-1])
    total = values.sum(axis=-1)
    codes = np.empty_like(values)
    best_error = np.full(least.shape, np.inf, np.float32)
    best_scale, best_depth = np.zeros_like(least), np.zeros_like(least)
    for low in _SHARES:
        for high in _SHARES:
            depth = least * np.float32(-low)
            scale = np.maximum((largest * np.float32(high) + depth) / _MOST, _TINY)
            for _ in range(_ROUNDS):
                _encode(values, scale, depth, codes)
                sums = codes.sum(axis=-1)
                squares = np.einsum("ngk,ngk->ng", codes, codes)
                products = np.einsum("ngk,ngk->ng", codes, values)
                spread = size * squares - sums * sums
                fitted = (size * products - sums * total) / np.maximum(spread, 1)
                depth = (fitted * sums - total) / size
                # A minimum above 0 cannot be stored: then the line goes through 0.
                through_zero = products / np.maximum(squares, 1)
                fitted = np.where(depth < 0, through_zero, fitted)
                depth = np.maximum(depth, 0)
                scale = np.where((spread > 0) & (fitted > 0), fitted, scale)
            _encode(values, scale, depth, codes)
            codes *= scale[..., None]
            codes -= depth[..., None]
            codes -= values
            error = np.einsum("ngk,ngk->ng", codes, codes)
            better = error < best_error
            best_error = np.where(better, error, best_error)
            best_scale = np.where(better, scale, best_scale)
            best_depth = np.where(better, depth, best_depth)
    return best_scale, best_depth


def _encode(values: np.ndarray, scales: np.ndarray, depths: np.ndarray, out: np.ndarray) -> None:
    """The nearest of 16 codes on each group's line; where the scale is 0, code 0."""
    reciprocals = np.where(scales > _TINY, 1 / np.maximum(scales, _TINY), 0).astype(np.float32)
    np.add(values, depths[..., None], out=out)
    out *= reciprocals[..., None]
    np.rint(out, out=out)
    np.clip(out, 0, _MOST, out=out)


def _two_level(values: np.ndarray, supers: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 [n, groups], none below 0 -> uint8 codes, the float16 each `supers` groups share, and what they say."""
    rows, groups = values.shape
    padded = np.zeros((rows, -(-groups // supers) * supers), np.float32)
    padded[:, :groups] = values
    blocks = padded.reshape(rows, -1, supers)
    largest = blocks.max(axis=-1)
    shared = (largest / 255).astype(np.float16)
    # Among float16's subnormals rounding down may leave the largest out of reach.
    short = largest > 255.5 * shared.astype(np.float32)
    shared[short] = np.nextafter(shared[short], np.float16(np.inf))
    steps = shared.astype(np.float32)[..., None]
    codes = np.clip(np.rint(blocks / np.where(steps > 0, steps, 1)), 0, 255)
    said = (codes * steps).reshape(rows, -1)[:, :groups]
    return codes.astype(np.uint8).reshape(rows, -1)[:, :groups], shared, said
