"""How each product of a decode batch is cut: measured ones by (card, shape, rows), else a rule that fits every card.

Nothing stored depends on a tile. Shape letters: M rows of x, N output rows, C padded columns.
"""

from __future__ import annotations

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
        return table[group, rows, columns, sizes[0]]
    return _default(multiprocessors, rows, columns, count, splitting=splitting)


def _default(multiprocessors: int, rows: int, columns: int, count: int, *, splitting: bool) -> PlanesTile:
    """About two CTAs a multiprocessor, of four steps of 64 columns or more."""
    ctas = -(-rows // 64) * -(-count // 64)
    most = max(1, columns // 256)
    splits = max(1, min(PARTIAL_SUMS, most, 2 * multiprocessors // ctas)) if splitting else 1
    return PlanesTile(64, 64, 64, 4, 4, splits)


_MEASURED: Mapping[str, dict[Key, PlanesTile]] = {"hopper": {}}
