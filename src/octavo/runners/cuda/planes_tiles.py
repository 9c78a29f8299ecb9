"""How each product of a decode batch is cut: measured ones by (card, shape, rows), else a rule that fits every card.

Nothing stored depends on a tile. Shape letters: M rows of x, N output rows, C padded columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from octavo.runners.cuda.limits import PARTIAL_SUMS
from octavo.runners.cuda.planes_linear import PlanesTile
from octavo.runners.cuda.tiles import family_of

Key = tuple[int, int, int, int]
"""Group size, output rows, columns, and rows of x: a power of two, which also serves those below it."""


def planes_tile_for(
    card: str, multiprocessors: int, group: int, rows: int, columns: int, count: int, *, splitting: bool
) -> PlanesTile:
    """The tile of a [rows, columns] matrix, `columns` padded, for `count` tokens. `splitting`: who reads the product
    adds partial sums."""
    table = _MEASURED.get(family_of(card), {})
    sizes = sorted(key[3] for key in table if key[:3] == (group, rows, columns) and key[3] >= count)
    if sizes:
        tile = table[group, rows, columns, sizes[0]]
        return tile if splitting else dataclasses.replace(tile, splits=1)
    return _default(multiprocessors, rows, columns, count, splitting=splitting)


def _default(multiprocessors: int, rows: int, columns: int, count: int, *, splitting: bool) -> PlanesTile:
    """About two CTAs a multiprocessor, of four steps of 64 columns or more."""
    ctas = -(-rows // 64) * -(-count // 64)
    most = max(1, columns // 256)
    splits = max(1, min(PARTIAL_SUMS, most, 2 * multiprocessors // ctas)) if splitting else 1
    return PlanesTile(64, 64, 64, 4, 4, splits)


_MEASURED: Mapping[str, dict[Key, PlanesTile]] = {
    # One H100 80GB HBM3, torch 2.11, triton 3.6, 2026-11-24. Gemma-2-2B's shapes, and Llama-3.1-8B's in groups of
    # 64: the best of whole steps, one linear after the other. The others: the best of the product alone.
    "hopper": {
        (64, 4096, 2304, 8): PlanesTile(128, 128, 128, 3, 4, 8, 128),
        (64, 2304, 2048, 8): PlanesTile(128, 128, 128, 3, 4, 4, 128),
        (64, 18432, 2304, 8): PlanesTile(64, 128, 128, 3, 4, 1, 128),
        (64, 2304, 9216, 8): PlanesTile(128, 128, 128, 3, 4, 8, 128),
        (64, 256000, 2304, 8): PlanesTile(128, 128, 128, 4, 4, 1, 128),
        (64, 4096, 2304, 32): PlanesTile(128, 128, 128, 3, 4, 8, 128),
        (64, 2304, 2048, 32): PlanesTile(64, 128, 64, 4, 4, 4, 128),
        (64, 18432, 2304, 32): PlanesTile(64, 128, 128, 3, 4, 1, 128),
        (64, 2304, 9216, 32): PlanesTile(128, 128, 128, 3, 4, 8, 128),
        (64, 256000, 2304, 32): PlanesTile(128, 128, 64, 4, 4, 1, 128),
        (64, 4096, 2304, 128): PlanesTile(128, 64, 64, 4, 8, 4, 128),
        (64, 2304, 2048, 128): PlanesTile(64, 64, 128, 3, 4, 4, 128),
        (64, 18432, 2304, 128): PlanesTile(64, 64, 64, 4, 4, 1, 128),
        (64, 2304, 9216, 128): PlanesTile(64, 128, 64, 4, 4, 4, 128),
        (64, 256000, 2304, 128): PlanesTile(128, 64, 64, 4, 4, 1, 128),
        (0, 4096, 2304, 8): PlanesTile(64, 128, 256, 3, 4, 4, 128),
        (0, 2304, 2048, 8): PlanesTile(64, 128, 256, 4, 4, 4, 128),
        (0, 18432, 2304, 8): PlanesTile(64, 128, 256, 3, 4, 1, 128),
        (0, 2304, 9216, 8): PlanesTile(64, 128, 256, 3, 4, 4, 128),
        (0, 256000, 2304, 8): PlanesTile(64, 128, 256, 4, 4, 1, 128),
        (0, 4096, 2304, 32): PlanesTile(64, 128, 256, 3, 4, 4, 128),
        (0, 2304, 2048, 32): PlanesTile(64, 128, 256, 4, 4, 2, 128),
        (0, 18432, 2304, 32): PlanesTile(64, 128, 128, 4, 4, 1, 128),
        (0, 2304, 9216, 32): PlanesTile(128, 128, 128, 3, 4, 8, 128),
        (0, 256000, 2304, 32): PlanesTile(64, 128, 128, 4, 4, 1, 128),
        (0, 4096, 2304, 128): PlanesTile(64, 64, 128, 4, 4, 2, 128),
        (0, 2304, 2048, 128): PlanesTile(64, 64, 128, 4, 4, 2, 128),
        (0, 18432, 2304, 128): PlanesTile(64, 64, 128, 4, 4, 1, 128),
        (0, 2304, 9216, 128): PlanesTile(64, 64, 128, 4, 4, 2, 128),
        (0, 256000, 2304, 128): PlanesTile(64, 64, 128, 4, 4, 1, 128),
        (64, 6144, 4096, 8): PlanesTile(64, 128, 256, 3, 4, 4, 128),
        (64, 4096, 4096, 8): PlanesTile(128, 128, 128, 3, 4, 4, 128),
        (64, 28672, 4096, 8): PlanesTile(64, 128, 128, 4, 4, 1, 128),
        (64, 4096, 14336, 8): PlanesTile(64, 128, 256, 3, 4, 4, 128),
        (64, 128256, 4096, 8): PlanesTile(64, 128, 64, 10, 4, 1, 128),
        (64, 6144, 4096, 32): PlanesTile(64, 128, 128, 4, 4, 4, 128),
        (64, 4096, 4096, 32): PlanesTile(128, 128, 128, 3, 4, 8, 128),
        (64, 28672, 4096, 32): PlanesTile(128, 128, 64, 4, 8, 1, 128),
        (64, 4096, 14336, 32): PlanesTile(64, 128, 256, 3, 4, 4, 128),
        (64, 128256, 4096, 32): PlanesTile(128, 128, 128, 3, 4, 1, 128),
        (64, 6144, 4096, 128): PlanesTile(64, 128, 64, 3, 4, 2, 128),
        (64, 4096, 4096, 128): PlanesTile(64, 128, 64, 4, 4, 4, 128),
        (64, 28672, 4096, 128): PlanesTile(64, 64, 64, 6, 4, 1, 128),
        (64, 4096, 14336, 128): PlanesTile(128, 128, 64, 4, 8, 4, 128),
        (64, 128256, 4096, 128): PlanesTile(128, 64, 64, 4, 4, 1, 128),
        (0, 6144, 4096, 8): PlanesTile(64, 128, 256, 3, 4, 4, 128),
        (0, 4096, 4096, 8): PlanesTile(64, 128, 256, 4, 4, 4, 128),
        (0, 28672, 4096, 8): PlanesTile(64, 128, 256, 3, 4, 1, 128),
        (0, 4096, 14336, 8): PlanesTile(64, 128, 256, 3, 4, 4, 128),
        (0, 128256, 4096, 8): PlanesTile(64, 128, 256, 3, 4, 1, 128),
        (0, 6144, 4096, 32): PlanesTile(64, 128, 128, 4, 4, 4, 128),
        (0, 4096, 4096, 32): PlanesTile(64, 128, 256, 3, 4, 4, 128),
        (0, 28672, 4096, 32): PlanesTile(64, 128, 128, 4, 4, 1, 128),
        (0, 4096, 14336, 32): PlanesTile(64, 128, 256, 3, 4, 4, 128),
        (0, 128256, 4096, 32): PlanesTile(64, 128, 256, 3, 4, 1, 128),
        (0, 6144, 4096, 128): PlanesTile(64, 64, 128, 4, 4, 1, 128),
        (0, 4096, 4096, 128): PlanesTile(64, 64, 128, 4, 4, 2, 128),
        (0, 28672, 4096, 128): PlanesTile(128, 64, 128, 3, 8, 1, 128),
        (0, 4096, 14336, 128): PlanesTile(64, 64, 128, 4, 4, 2, 128),
        (0, 128256, 4096, 128): PlanesTile(128, 128, 128, 4, 8, 1, 128),
    }
}
