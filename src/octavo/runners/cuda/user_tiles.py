"""The tiles that `octavo bench --tune` found on this machine, kept in the cache folder: read by every CUDA runner.

A JSON file, tiles by card. What is read is checked: a tile only decides speed, but one that no kernel can have would
fail in the middle of a load. Imports neither torch nor triton.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from octavo.errors import CacheError
from octavo.paths import cache_root
from octavo.runners.cuda.layout import CODE_BITS, COLUMN_BLOCK
from octavo.runners.cuda.tiles import Key, Tile

_NAME = "cuda-tiles.json"
_VERSION = 1
_MOST_BYTES: Final = 1 << 20
_POWERS = frozenset(1 << i for i in range(11))


def user_tiles_path() -> Path:
    """Raises CacheError where the cache folder cannot be used."""
    return cache_root() / _NAME


def user_tiles(card: str) -> dict[Key, Tile]:
    """Of the default cache folder, none where there is none. Raises CacheError for a file that is no table of tiles."""
    try:
        path = user_tiles_path()
    except CacheError:
        return {}
    return read_user_tiles(path, card)


def read_user_tiles(path: Path, card: str) -> dict[Key, Tile]:
    """Those of a card; none where there is no file. Raises CacheError for a file that is no table of tiles."""
    tables = _read(path)
    return dict(map(_entry, tables.get(card, []))) if tables else {}


def write_user_tiles(path: Path, card: str, tiles: Mapping[Key, Tile]) -> None:
    """Add them to the card's, in place of those of the same shapes. Raises CacheError."""
    tables = _read(path)
    kept = dict(map(_entry, tables.get(card, []))) | dict(tiles)
    tables[card] = [_described(key, tile) for key, tile in sorted(kept.items())]
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps({"version": _VERSION, "cards": tables}, indent=1), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CacheError(
            f"cannot write {path}: {error.strerror}", remedy="Free space there, or set OCTAVO_CACHE."
        ) from error


def _read(path: Path) -> dict[str, list[Any]]:
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        return {}
    try:
        if len(text) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        document = json.loads(text)
        if document["version"] != _VERSION:
            raise ValueError(f"it has version {document['version']!r}, not {_VERSION}")
        cards: dict[str, list[Any]] = document["cards"]
        for table in cards.values():
            for entry in table:
                _entry(entry)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CacheError(
            f"{path} is no table of tiles: {error}", remedy="Remove it, and run again: octavo bench --tune"
        ) from error
    return cards


def _entry(entry: Mapping[str, Any]) -> tuple[Key, Tile]:
    """Raises ValueError, KeyError or TypeError for what is none."""
    sizes = [entry[name] for name in ("group_size", "rows", "columns")]
    shape = [entry[name] for name in ("lanes", "tile_rows", "warps", "ctas_per_multiprocessor")]
    if not all(type(number) is int and 0 <= number < 1 << 31 for number in (*sizes, *shape)):
        raise ValueError(f"{dict(entry)} has a size that is none")
    lanes, tile_rows, warps, ctas = shape
    possible = (
        entry["codec"] in CODE_BITS
        and sizes[2] % COLUMN_BLOCK == 0
        and lanes in _POWERS
        and 2 <= tile_rows <= 32
        and tile_rows in _POWERS
        and warps <= 32
        and warps in _POWERS
        and 1 <= ctas <= 64
    )
    if not possible:
        raise ValueError(f"{dict(entry)} is no tile that kernels can have")
    return (entry["codec"], sizes[0], sizes[1], sizes[2]), Tile(lanes, tile_rows, warps, ctas)


def _described(key: Key, tile: Tile) -> dict[str, str | int]:
    codec, group_size, rows, columns = key
    return {
        "codec": codec,
        "group_size": group_size,
        "rows": rows,
        "columns": columns,
        "lanes": tile.lanes,
        "tile_rows": tile.rows,
        "warps": tile.warps,
        "ctas_per_multiprocessor": tile.ctas_per_multiprocessor,
    }
