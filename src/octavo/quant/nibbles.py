"""Two 4-bit codes in a byte: the even column in the low nibble, the odd one in the high nibble.

Shape letters: N output rows, K input columns.
"""

from __future__ import annotations

import numpy as np


def join_nibbles(codes: np.ndarray) -> np.ndarray:
    """uint8 [N, K] of 0..15 -> uint8 [N, ceil(K / 2)]; the last high nibble is zero where K is odd."""
    joined = codes[:, 0::2].copy()
    high = codes[:, 1::2]
    joined[:, : high.shape[1]] |= high << 4
    return joined


def split_nibbles(joined: np.ndarray, columns: int) -> np.ndarray:
    """uint8 [N, ceil(columns / 2)] -> uint8 [N, columns] of 0..15."""
    codes = np.empty((len(joined), 2 * joined.shape[1]), np.uint8)
    np.bitwise_and(joined, 15, out=codes[:, 0::2])
    np.right_shift(joined, 4, out=codes[:, 1::2])
    return codes[:, :columns]
