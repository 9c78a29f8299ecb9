"""Cutting a matrix into row blocks, so that temporaries stay in the processor's cache whatever the matrix.

Shape letters: N output rows, K input columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

_BLOCK_VALUES = 1 << 17
"""512 KiB of float32: fits a second-level cache beside its result."""


def row_blocks(shape: tuple[int, ...], block_values: int = _BLOCK_VALUES) -> Iterator[slice]:
    """Slices that cover the rows of [N, K] (or [N]) in order, each of about `block_values` values or one row."""
    rows = max(1, block_values // max(1, prod(shape[1:])))
    for first in range(0, shape[0], rows):
        yield slice(first, min(first + rows, shape[0]))
