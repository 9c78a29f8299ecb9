"""Tiles: the user's table is kept, checked when read, and goes before the measured ones; candidates are possible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.errors import CacheError
from octavo.runners.cuda.layout import Encoding
from octavo.runners.cuda.tiles import Tile, key_of, measured_tiles, tile_for
from octavo.runners.cuda.user_tiles import read_user_tiles, user_tiles, user_tiles_path, write_user_tiles

INT8 = Encoding("i8", 64, "f16")
KEY = key_of(INT8, 18432, 2304)
TILE = Tile(128, 8, 4, 3)


def test_a_table_is_kept_by_card(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    assert read_user_tiles(path, "card") == {}
    other = key_of(Encoding("u4", 32, "f16"), 64, 64)
    write_user_tiles(path, "card", {KEY: Tile(64, 2, 2, 2), other: TILE})
    write_user_tiles(path, "another", {KEY: Tile(32, 2, 1, 1)})
    write_user_tiles(path, "card", {KEY: TILE})
    assert read_user_tiles(path, "card") == {KEY: TILE, other: TILE}
    assert read_user_tiles(path, "third") == {}
    assert [each.name for each in tmp_path.iterdir()] == ["tiles.json"]


def test_it_lies_in_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    write_user_tiles(user_tiles_path(), "card", {KEY: TILE})
    assert user_tiles("card") == {KEY: TILE}
    (tmp_path / "file").touch()
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "file"))
    assert user_tiles("card") == {}


def test_the_users_go_first() -> None:
    measured = measured_tiles("hopper")[KEY]
    assert tile_for("NVIDIA H100 80GB HBM3", INT8, *KEY[2:]) == measured != TILE
    assert tile_for("NVIDIA H100 80GB HBM3", INT8, *KEY[2:], {KEY: TILE}) == TILE
    assert tile_for("unknown", INT8, *KEY[2:]) not in (measured, TILE)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lanes": 48}, "no tile"),
        ({"lanes": 2048}, "no tile"),
        ({"tile_rows": 1}, "no tile"),
        ({"warps": 64}, "no tile"),
        ({"ctas_per_multiprocessor": 0}, "no tile"),
        ({"columns": 100}, "no tile"),
        ({"codec": "i9"}, "no tile"),
        ({"rows": -1}, "a size that is none"),
        ({"rows": True}, "a size that is none"),
        ({"rows": None}, "a size that is none"),
        ({"codec": []}, "unhashable"),
        (None, "warps"),
    ],
)
def test_what_is_no_tile_is_refused(change: Any, named: str, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    write_user_tiles(path, "card", {KEY: TILE})
    document = json.loads(path.read_text())
    entry = document["cards"]["card"][0]
    if change is None:
        del entry["warps"]
    else:
        entry.update(change)
    path.write_text(json.dumps(document))
    with pytest.raises(CacheError, match=named) as caught:
        read_user_tiles(path, "card")
    assert "octavo bench --tune" in caught.value.remedy


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"version": 2, "cards": {}}', '{"version": 1, "cards": 3}', "[" * 9000]
)
def test_what_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.raises(CacheError, match="no table of tiles"):
        read_user_tiles(path, "card")
    path.write_text(" " * ((1 << 20) + 1) + text)
    with pytest.raises(CacheError, match="more than 1048576 bytes"):
        read_user_tiles(path, "card")
