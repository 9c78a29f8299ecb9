"""The tables of 4-bit codebooks as `gemv` looks them up: 16 bytes a plane, in words for byte permutes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from octavo.quant.tables import TABLES
from octavo.runners.cuda.layout import Codec

_LARGEST = 32512
"""As of the activations: 127 * 256."""


def _words(plane: np.ndarray) -> tuple[int, ...]:
    return tuple(int(word) for word in plane.astype(np.int8).view(np.int32))


def _planes(values: np.ndarray) -> tuple[tuple[int, ...], float]:
    """One plane where the entries are bytes, else the high and the low bytes of 16-bit fixed point."""
    if (values == np.rint(values)).all() and np.abs(values).max() <= 127:
        return _words(values), 1.0
    step = float(np.abs(values).max()) / _LARGEST
    fixed = np.rint(values.astype(np.float64) / step).astype(np.int32)
    high = (fixed + 128) >> 8
    return _words(high) + _words(fixed - 256 * high), 256 * step


CODE_TABLES: Mapping[Codec, tuple[tuple[int, ...], float]] = {
    "nf4": _planes(TABLES["nf4"]),
    "fp4": _planes(TABLES["fp4"]),
    "iq4": _planes(TABLES["iq4"]),
    "i4": ((), 1 / 16),
}
"""Codec -> (4 or 8 words, what the product of a code and an activation of one is counted in)."""
