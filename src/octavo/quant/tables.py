"""The tables of codebook formats: what each code stands for before its group's scale.

Sources: nf4 and fp4, bitsandbytes' get_4bit_type (nf4 after Dettmers et al. 2023, appendix E; fp4's code 8 is
the zero that its table has, its CPU kernel makes it -0); iq4, the
kvalues_iq4nl of ggml-common.h; e4m3, the OCP 8-bit float (no infinities; 0x7f and 0xff are no numbers).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

TableName = Literal["nf4", "fp4", "iq4", "e4m3"]


def _table(values: list[float]) -> np.ndarray:
    table = np.array(values, np.float32)
    table.flags.writeable = False
    return table


def _e4m3() -> np.ndarray:
    codes = np.arange(256)
    exponents, mantissas = codes >> 3 & 15, codes & 7
    magnitudes = np.where(exponents == 0, mantissas * 2.0**-9, (8 + mantissas) * 2.0 ** (exponents - 10))
    magnitudes[codes & 0x7F == 0x7F] = np.nan
    return _table(np.where(codes & 0x80, -magnitudes, magnitudes).tolist())


_FP4_TWELFTHS = (0, 0.0625, 8, 12, 4, 6, 2, 3)

TABLES: Mapping[TableName, np.ndarray] = {
    "nf4": _table(
        [
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434,
            0.5626170039176941,
            0.7229568362236023,
            1.0,
        ]
    ),
    "fp4": _table([0.0 + sign * twelfths / 12 for sign in (1, -1) for twelfths in _FP4_TWELFTHS]),
    "iq4": _table([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]),
    "e4m3": _e4m3(),
}
"""float32 [16] or [256]."""
