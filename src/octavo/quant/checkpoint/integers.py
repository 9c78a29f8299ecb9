"""Codes of 4 or 8 bits as the methods keep them in int32 words, lowest bits first, and as `Affine` keeps them.

Shape letters: N output rows, K input columns, W words.
"""

from __future__ import annotations

import numpy as np

from octavo.quant.nibbles import join_nibbles, split_nibbles


def from_words(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """int32 [N, W], consecutive codes along each row -> uint8 [N, count]."""
    data = np.ascontiguousarray(words).view(np.uint8)
    return split_nibbles(data, count) if bits == 4 else data[:, :count]


def codes_of_rows(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """int32 [N, W], consecutive columns along each row -> `codes` of an Affine format."""
    data = np.ascontiguousarray(words).view(np.uint8)
    if bits == 4:  # a word's nibbles are in the order of ours
        codes = data[:, : (columns + 1) // 2].copy()
        if columns % 2:
            codes[:, -1] &= 15
        return codes
    return centered(data[:, :columns])


def codes_of_columns(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [W, N], a word the consecutive columns of one row -> `codes` of an Affine format, K = 32 / bits * W."""
    count, rows = words.shape
    by_word = np.ascontiguousarray(words).view(np.uint8).reshape(count, rows, 4)
    data = np.ascontiguousarray(by_word.transpose(1, 0, 2)).reshape(rows, -1)
    return data if bits == 4 else centered(data)


def centered(codes: np.ndarray) -> np.ndarray:
    """uint8 0..255 -> int8: 128 less."""
    less: np.ndarray = (codes ^ np.uint8(128)).view(np.int8)
    return less


def zeros_of(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes that mean 0 -> int8 `zeros` of an Affine format."""
    return codes.astype(np.int8) if bits == 4 else centered(codes)


def reordered(codes: np.ndarray, bits: int, order: np.ndarray) -> np.ndarray:
    """The columns of an Affine format's `codes`, as `order` int32 [K] lists them."""
    if bits == 8:
        return codes[:, order]
    return join_nibbles(split_nibbles(codes, len(order))[:, order])
