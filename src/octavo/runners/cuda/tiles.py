"""Which tile each batch-1 linear takes: measured ones by (card, shape), else a rule that fits every card.

Nothing stored depends on a tile. Shape letters: N output rows, C padded columns, L lanes of 16 bytes at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from octavo.runners.cuda.layout import CODE_BITS, Codec, Encoding

Key = tuple[Codec, int, int, int]
"""Codec, group size, rows, columns."""

LANE_COLUMNS: Mapping[Codec, int] = {codec: 128 // bits for codec, bits in CODE_BITS.items()}
"""Columns in 16 bytes of a row."""


@dataclass(frozen=True, slots=True)
class Tile:
    lanes: int
    """A power of two; with `rows` it is what a CTA multiplies at once."""
    rows: int
    warps: int
    ctas_per_multiprocessor: int
    """Bounds the grid: a CTA walks the blocks that are left."""


def key_of(encoding: Encoding, rows: int, columns: int) -> Key:
    return encoding.codec, encoding.group_size, rows, columns


def tile_for(
    card: str, encoding: Encoding, rows: int, columns: int, users: Mapping[Key, Tile] | None = None
) -> Tile:
    """The tile of a [rows, columns] matrix, `columns` padded; the user's go before the measured ones."""
    key = key_of(encoding, rows, columns)
    measured = measured_tiles(family_of(card))
    found = (users or {}).get(key) or measured.get(key) or _like(measured, key)
    return found or _default(encoding.codec, rows, columns)


def measured_tiles(family: str) -> dict[Key, Tile]:
    """The table of a family of cards; tuning writes to it."""
    return _MEASURED.get(family, {})


def family_of(card: str) -> str:
    """H100 and H200 have the same multiprocessors."""
    return "hopper" if "H100" in card or "H200" in card else card


def _like(table: Mapping[Key, Tile], key: Key) -> Tile | None:
    """The tile of the same shape in another codec of as many bits, or with other groups."""
    for (codec, _, rows, columns), tile in table.items():
        if (CODE_BITS[codec], rows, columns) == (CODE_BITS[key[0]], *key[2:]):
            return tile
    return None


def _default(codec: Codec, rows: int, columns: int) -> Tile:
    """Eight times 16 bytes of codes a thread at once, or fewer: twice that fits its registers."""
    lanes = 1 << max(5, (columns // LANE_COLUMNS[codec] - 1).bit_length())
    if CODE_BITS[codec] > 8:
        lanes = min(lanes, 256)
        return Tile(lanes, 4 if rows >= 4096 else 2, lanes // 32, 4)
    lanes = min(max(32, lanes // 2), 256)
    steps = -(-columns // (LANE_COLUMNS[codec] * lanes))
    return Tile(lanes, max(2, 8 >> (steps - 1).bit_length()), lanes // 32, max(2, 512 // lanes))


_MEASURED: Mapping[str, dict[Key, Tile]] = {
    # H100 80GB HBM3, torch 2.11, triton 3.6, 2026-11-24: as `octavo bench --tune` does it. Those of 4,096 and 14,336
    # columns in the step of six kernels a layer, the others in that of eight.
    "hopper": {
        ("i8", 64, 18432, 2304): Tile(32, 2, 1, 12),
        ("i8", 64, 2304, 9216): Tile(256, 2, 8, 2),
        ("i8", 64, 4096, 2304): Tile(64, 8, 2, 6),
        ("i8", 64, 2304, 2048): Tile(128, 4, 4, 3),
        ("i8", 64, 256000, 2304): Tile(64, 4, 2, 6),
        ("i8", 64, 28672, 4096): Tile(128, 4, 4, 4),
        ("i8", 64, 4096, 14336): Tile(256, 2, 8, 2),
        ("i8", 64, 6144, 4096): Tile(128, 4, 4, 6),
        ("i8", 64, 4096, 4096): Tile(128, 4, 4, 4),
        ("i8", 64, 128256, 4096): Tile(128, 4, 4, 8),
        ("i8", 64, 16384, 2048): Tile(128, 4, 4, 8),
        ("i8", 64, 2048, 8192): Tile(256, 2, 8, 4),
        ("i8", 64, 3072, 2048): Tile(64, 2, 2, 16),
        ("i8", 64, 2048, 2048): Tile(128, 4, 4, 4),
        ("i8", 64, 128256, 2048): Tile(128, 8, 4, 4),
        ("i8", 0, 18432, 2304): Tile(32, 2, 1, 12),
        ("i8", 0, 2304, 9216): Tile(256, 2, 8, 2),
        ("i8", 0, 4096, 2304): Tile(32, 4, 1, 8),
        ("i8", 0, 2304, 2048): Tile(128, 4, 4, 8),
        ("i8", 0, 256000, 2304): Tile(32, 2, 1, 16),
        ("i8", 0, 28672, 4096): Tile(128, 4, 4, 4),
        ("i8", 0, 4096, 14336): Tile(512, 2, 16, 2),
        ("i8", 0, 6144, 4096): Tile(128, 4, 4, 3),
        ("i8", 0, 4096, 4096): Tile(128, 4, 4, 4),
        ("i8", 0, 128256, 4096): Tile(128, 4, 4, 4),
        ("i8", 0, 16384, 2048): Tile(128, 4, 4, 8),
        ("i8", 0, 2048, 8192): Tile(256, 2, 8, 4),
        ("i8", 0, 3072, 2048): Tile(32, 2, 1, 16),
        ("i8", 0, 2048, 2048): Tile(128, 8, 4, 2),
        ("i8", 0, 128256, 2048): Tile(128, 8, 4, 16),
        ("i4", 128, 28672, 4096): Tile(128, 16, 8, 2),
        ("i4", 128, 4096, 14336): Tile(256, 2, 8, 3),
        ("i4", 128, 6144, 4096): Tile(128, 8, 4, 3),
        ("i4", 128, 4096, 4096): Tile(128, 4, 4, 4),
        ("u4", 32, 18432, 2304): Tile(32, 2, 1, 12),
        ("u4", 32, 2304, 9216): Tile(256, 2, 8, 2),
        ("u4", 32, 4096, 2304): Tile(32, 2, 1, 8),
        ("u4", 32, 2304, 2048): Tile(64, 4, 2, 6),
        ("u4", 32, 256000, 2304): Tile(32, 2, 1, 16),
        ("u4", 32, 28672, 4096): Tile(128, 16, 8, 2),
        ("u4", 32, 4096, 14336): Tile(256, 4, 8, 2),
        ("u4", 32, 6144, 4096): Tile(128, 8, 4, 3),
        ("u4", 32, 4096, 4096): Tile(128, 16, 8, 1),
        ("u4", 32, 16384, 2048): Tile(32, 2, 1, 16),
        ("u4", 32, 2048, 8192): Tile(256, 4, 8, 3),
        ("u4", 32, 3072, 2048): Tile(32, 2, 1, 16),
        ("u4", 32, 2048, 2048): Tile(64, 4, 2, 6),
        ("u4", 32, 128256, 2048): Tile(64, 4, 2, 12),
    }
}
