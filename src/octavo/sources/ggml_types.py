"""The tensor types of ggml, by the number GGUF files store: name, elements a block, bytes a block.

Numbers and layouts: ggml.h and ggml-common.h. Which of them can be decoded is the quantizers' business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class GGMLType:
    name: str
    """Lower case: f32, q4_1, q6_k, ..."""
    block_elements: int
    block_bytes: int
    dtype: np.dtype[Any]
    """Of the stored values; uint8 for block types, whose rows are read as bytes. bf16 is uint16 bits."""


def _plain(name: str, dtype: str) -> GGMLType:
    stored = np.dtype(dtype)
    return GGMLType(name, 1, stored.itemsize, stored)


def _block(name: str, elements: int, nbytes: int) -> GGMLType:
    return GGMLType(name, elements, nbytes, np.dtype(np.uint8))


GGML_TYPES = {
    0: _plain("f32", "<f4"),
    1: _plain("f16", "<f2"),
    2: _block("q4_0", 32, 18),
    3: _block("q4_1", 32, 20),
    6: _block("q5_0", 32, 22),
    7: _block("q5_1", 32, 24),
    8: _block("q8_0", 32, 34),
    9: _block("q8_1", 32, 40),
    10: _block("q2_k", 256, 84),
    11: _block("q3_k", 256, 110),
    12: _block("q4_k", 256, 144),
    13: _block("q5_k", 256, 176),
    14: _block("q6_k", 256, 210),
    15: _block("q8_k", 256, 292),
    16: _block("iq2_xxs", 256, 66),
    17: _block("iq2_xs", 256, 74),
    18: _block("iq3_xxs", 256, 98),
    19: _block("iq1_s", 256, 50),
    20: _block("iq4_nl", 32, 18),
    21: _block("iq3_s", 256, 110),
    22: _block("iq2_s", 256, 82),
    23: _block("iq4_xs", 256, 136),
    24: _plain("i8", "<i1"),
    25: _plain("i16", "<i2"),
    26: _plain("i32", "<i4"),
    27: _plain("i64", "<i8"),
    28: _plain("f64", "<f8"),
    29: _block("iq1_m", 256, 56),
    30: _plain("bf16", "<u2"),
    34: _block("tq1_0", 256, 54),
    35: _block("tq2_0", 256, 66),
    39: _block("mxfp4", 32, 17),
    40: _block("nvfp4", 64, 36),
    41: _block("q1_0", 128, 18),
}
"""The numbers missing in between were types that ggml has removed."""
