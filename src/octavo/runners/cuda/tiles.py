"""Which tile each batch-1 linear takes: measured ones by (card, shape), else a rule that fits every card.

Nothing stored depends on a tile. Shape letters: N output rows, C padded columns, L lanes of 16 bytes at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from octavo.runners.cuda.layout import Codec

LANE_COLUMNS: Mapping[Codec, int] = {"i8": 16, "u4": 32, "f16": 8, "bf16": 8, "f32": 4}
"""Columns in 16 bytes of a row."""


@dataclass(frozen=True, slots=True)
class Tile:
    lanes: int
    """A power of two; with `rows` it is what a CTA multiplies at once."""
    rows: int
    warps: int
    ctas_per_multiprocessor: int
    """Bounds the grid: a CTA walks the blocks that are left."""


def tile_for(card: str, codec: Codec, rows: int, columns: int) -> Tile:
    """The tile of a [rows, columns] matrix, `columns` padded."""
    measured = _MEASURED.get(_family(card), {}).get((codec, rows, columns))
    return measured or _default(codec, rows, columns)


def _default(codec: Codec, rows: int, columns: int) -> Tile:
    """A row in one step where 256 lanes hold it, at most 32 registers of codes a thread, enough CTAs for a wave."""
    lanes = 1 << max(4, (columns // LANE_COLUMNS[codec] - 1).bit_length())
    lanes = min(lanes, 256)
    tall = 8 if rows >= 16384 else 4 if rows >= 4096 else 2
    return Tile(lanes, tall, max(1, lanes // 32), 4)


def _family(card: str) -> str:
    """H100 and H200 have the same multiprocessors."""
    return "hopper" if "H100" in card or "H200" in card else card


_MEASURED: Mapping[str, Mapping[tuple[Codec, int, int], Tile]] = {"hopper": {}}
