"""How weights become codes: one function for each published rule, bit-equal to the library that set it.

Each takes a block [n, groups, G] of float32 weights (K columns a row, zero beyond them), overwrites it with
the codes as whole floats, and returns the other arrays of the format by name: [n, groups], or [n, supers].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from octavo.errors import ModelFormatError
from octavo.quant.scale_search import search_scales

Rule = Callable[[np.ndarray, int], dict[str, np.ndarray]]
RuleName = Literal["stored-scale", "bitsandbytes", "ggml", "search"]

_GGML_BLOCK = 32


def _stored_scale(grouped: np.ndarray, columns: int) -> dict[str, np.ndarray]:
    """Symmetric codes -127..127 with float16 scales; each code is the nearest for the scale as stored."""
    largest = _absmax(grouped)
    _require_finite(largest)
    with np.errstate(over="ignore"):
        scales = (largest / 127).astype(np.float16)
    if np.isinf(scales).any():
        raise ModelFormatError(
            f"a weight of {largest.max():.3g} is beyond what int8's float16 scales can hold (8.3e6)",
            remedy="Use --quant none.",
        )
    # Among float16's subnormals rounding down can lose far more than half a step: take the next scale up.
    short = largest > 127.25 * scales.astype(np.float32)
    scales[short] = np.nextafter(scales[short], np.float16(np.inf))
    divisors = np.where(scales == 0, np.float32(1), scales.astype(np.float32))
    grouped /= divisors[..., None]
    np.rint(grouped, out=grouped)
    return {"scales": scales}


def _bitsandbytes(grouped: np.ndarray, columns: int) -> dict[str, np.ndarray]:
    """Linear8bitLt: cast to float16, then int8_vectorwise_quant: round(w * (127 / absmax)), ties to even.

    torch computes 127 / absmax as reciprocal times 127, in float32.
    """
    with np.errstate(over="ignore"):
        grouped[...] = grouped.astype(np.float16)
    largest = _absmax(grouped)
    if not np.isfinite(largest).all():
        raise ModelFormatError(
            "a weight is not finite in float16, to which LLM.int8 casts weights",
            remedy="Use --quant int8 or --quant none.",
        )
    steps = 1 / np.where(largest == 0, np.float32(1), largest) * np.float32(127)
    grouped *= steps[..., None]
    np.rint(grouped, out=grouped)
    return {"scales": largest}


def _ggml_symmetric(grouped: np.ndarray, columns: int) -> dict[str, np.ndarray]:
    """quantize_row_q8_0_ref of ggml-quants.c: codes for the float32 scale, halves away from zero."""
    _require_whole_blocks(columns)
    largest = _absmax(grouped)
    _require_finite(largest)
    scales = largest / 127
    stored = _as_float16(scales)
    grouped *= _reciprocals(scales)[..., None]
    away = np.copysign(np.float32(0.5), grouped)
    # floor(|x|) + floor(2 * fraction), as roundf does: adding 0.5 first would round 0.49999997 up.
    whole = np.trunc(grouped)
    grouped -= whole
    whole += np.where(np.abs(grouped) >= 0.5, 2 * away, 0)
    grouped[...] = whole
    return {"scales": stored}


def _ggml_minimum(grouped: np.ndarray, columns: int) -> dict[str, np.ndarray]:
    """quantize_row_q4_1_ref of ggml-quants.c: codes 0..15 between a block's least and largest value."""
    _require_whole_blocks(columns)
    least, largest = grouped.min(axis=-1), grouped.max(axis=-1)
    _require_finite(least)
    _require_finite(largest)
    with np.errstate(over="ignore"):
        scales = (largest - least) / 15
    stored = {"scales": _as_float16(scales), "minimums": _as_float16(least)}
    grouped -= least[..., None]
    grouped *= _reciprocals(scales)[..., None]
    grouped += np.float32(0.5)
    np.trunc(grouped, out=grouped)
    np.minimum(grouped, 15, out=grouped)
    return stored


RULES: Mapping[tuple[RuleName, str], Rule] = {
    ("stored-scale", "none"): _stored_scale,
    ("bitsandbytes", "none"): _bitsandbytes,
    ("ggml", "none"): _ggml_symmetric,
    ("ggml", "minimum"): _ggml_minimum,
    ("search", "minimum"): search_scales,
}
"""By `Affine.rounding` and `Affine.zero`."""


def _absmax(grouped: np.ndarray) -> np.ndarray:
    largest: np.ndarray = np.abs(grouped).max(axis=-1)
    return largest


def _reciprocals(scales: np.ndarray) -> np.ndarray:
    # Below 2**-126 the reciprocal may overflow; in float16 such a scale is 0 as well.
    zero = scales < np.finfo(np.float32).tiny
    reciprocals: np.ndarray = np.where(zero, np.float32(0), 1 / np.where(zero, np.float32(1), scales))
    return reciprocals


def _as_float16(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16)
    if np.isinf(rounded).any():
        raise ModelFormatError(
            "a scale or minimum is beyond float16, in which this format stores it", remedy="Use --quant none."
        )
    return rounded


def _require_finite(values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise ModelFormatError(
            "a weight is infinite or not a number",
            remedy="The checkpoint is broken: fetch it again, or use another.",
        )


def _require_whole_blocks(columns: int) -> None:
    if columns % _GGML_BLOCK:
        raise ModelFormatError(
            f"ggml's formats need rows of a multiple of {_GGML_BLOCK} columns, not {columns}",
            remedy="Use --quant int8, which takes any width.",
        )
