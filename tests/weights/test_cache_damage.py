"""Whatever happens to an entry's bytes, it is made again and never loaded."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from octavo import packed_file
from octavo.errors import CacheError
from octavo.packed_cache import _checksum
from octavo.weights import cache_entries


@pytest.fixture
def entry(checkpoint, tmp_path):
    """A fresh entry: (cache root, data file, manifest)."""
    checkpoint.open(tmp_path).close()
    (found,) = cache_entries(tmp_path)
    return tmp_path, found.path, found.path.with_name(f"{found.key}.json")


@pytest.fixture
def is_made_again(checkpoint, expected, content, assert_same):
    """Opening after damage gives the right weights, says so, and leaves a good entry and nothing else."""

    def check(root, *, noticed: bool = True) -> None:
        store = checkpoint.open(root)
        assert_same(content(store), expected)
        assert not store.from_cache
        assert bool(store.notices) == noticed
        if noticed:
            assert "damaged" in store.notices[0]
        store.close()
        again = checkpoint.open(root)
        assert again.from_cache
        assert again.notices == ()
        assert_same(content(again), expected)
        again.close()
        assert sorted(path.suffix for path in (root / "packed").iterdir()) == [".json", ".safetensors"]

    return check


def flip(path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def data_positions(path) -> dict[str, int]:
    """A byte of each kind of place in the data file."""
    data = path.read_bytes()
    (room,) = struct.unpack("<Q", data[:8])
    arrays = json.loads(data[8 : 8 + room])
    start = 8 + room

    def middle(name: str) -> int:
        first, last = arrays[name]["data_offsets"]
        return start + (first + last) // 2

    padding = next(name for name in arrays if name.startswith("__padding__"))
    return {
        "header's length": 0,
        "header's end of length": 7,
        "header": 100,
        "header's spaces": start - 1,
        "first array": start,
        "codes": middle("layers.1.mixer.q.weight.codes"),
        "scales": middle("layers.0.ffn.down.weight.scales"),
        "norm": middle("layers.1.norms.pre_mixer.weight.values"),
        "padding": middle(padding),
        "last byte": len(data) - 1,
    }


@pytest.mark.parametrize(
    "place",
    [
        "header's length",
        "header's end of length",
        "header",
        "header's spaces",
        "first array",
        "codes",
        "scales",
        "norm",
        "padding",
        "last byte",
    ],
)
def test_a_flipped_bit_in_the_data(entry, is_made_again, place):
    root, data, _ = entry
    flip(data, data_positions(data)[place], bit=3)
    is_made_again(root)


def test_flipped_bits_anywhere_in_the_data(entry, checkpoint, expected, content, assert_same):
    root, data, _ = entry
    random = np.random.default_rng(0)
    for position in random.integers(0, data.stat().st_size, 40):
        flip(data, int(position), bit=int(random.integers(8)))
        store = checkpoint.open(root)
        assert not store.from_cache
        assert_same(content(store), expected)
        store.close()


def test_flipped_bits_anywhere_in_the_manifest(entry, checkpoint, expected, content, assert_same):
    """A change that is none, as one space for another, may pass; the weights are right in any case."""
    root, _, manifest = entry
    good = json.loads(manifest.read_bytes())
    random = np.random.default_rng(0)
    rebuilt = 0
    for position in random.integers(0, manifest.stat().st_size, 60):
        flip(manifest, int(position), bit=int(random.integers(8)))
        try:
            unchanged = json.loads(manifest.read_bytes()) == good
        except ValueError:
            unchanged = False
        store = checkpoint.open(root)
        assert store.from_cache == unchanged
        assert_same(content(store), expected)
        store.close()
        good = json.loads(manifest.read_bytes())
        rebuilt += not unchanged
    assert rebuilt > 40


@pytest.mark.parametrize("size", [0, 1, 8, 5000, -1])
def test_truncated_data(entry, is_made_again, size):
    root, data, _ = entry
    data.write_bytes(data.read_bytes()[:size])
    is_made_again(root)


def test_data_that_grew(entry, is_made_again):
    root, data, _ = entry
    data.write_bytes(data.read_bytes() + b"\0")
    is_made_again(root)


def test_data_that_is_a_folder(entry, checkpoint):
    """Nothing of ours, so not removed: a typed error says where it stands."""
    root, data, _ = entry
    data.unlink()
    data.mkdir()
    with pytest.raises(CacheError, match="packed: Is a directory"):
        checkpoint.open(root)


def test_missing_data(entry, is_made_again):
    root, data, _ = entry
    data.unlink()
    is_made_again(root, noticed=False)


def test_missing_manifest(entry, is_made_again):
    root, _, manifest = entry
    manifest.unlink()
    is_made_again(root, noticed=False)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"x"', "{}", '{"checksum": 1}', "[" * 100_000, "\xff"]
)
def test_a_manifest_of_nonsense(entry, is_made_again, text):
    root, _, manifest = entry
    manifest.write_bytes(text.encode("latin-1"))
    is_made_again(root)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data", "../../other.safetensors"),
        ("data", "/etc/passwd"),
        ("data", f"{'0' * 32}.{'0' * 16}.safetensors"),
        ("data", ["x"]),
        ("version", 2),
        ("arrays", []),
        ("arrays", 3),
        ("header_bytes", 0),
        ("header_bytes", -4096),
        ("header_bytes", 1 << 62),
        ("header_bytes", "4096"),
    ],
)
def test_a_manifest_with_a_right_checksum_that_lies(entry, is_made_again, field, value):
    """Not damage but somebody's work: still only what the file holds is ever mapped."""
    root, _, manifest = entry
    lies = json.loads(manifest.read_bytes()) | {field: value}
    del lies["checksum"]
    manifest.write_text(json.dumps(lies | {"checksum": _checksum(lies)}))
    is_made_again(root)


@pytest.mark.parametrize(
    "change",
    [
        {"offset": 0},
        {"offset": -64},
        {"offset": 1 << 62},
        {"shape": [1 << 40, 1 << 40]},
        {"shape": [-1, -1]},
        {"shape": ["a"]},
        {"dtype": "F64"},
        {"sha256": "0" * 64},
        {"name": "elsewhere.codes"},
        {"surprise": 1},
    ],
    ids=str,
)
def test_an_array_that_lies(entry, is_made_again, change):
    root, _, manifest = entry
    lies = json.loads(manifest.read_bytes())
    lies["arrays"][2] |= change
    del lies["checksum"]
    manifest.write_text(json.dumps(lies | {"checksum": _checksum(lies)}))
    is_made_again(root)


def test_the_control_an_untouched_entry_is_loaded(entry, checkpoint):
    root, data, _ = entry
    before = data.stat().st_ino
    store = checkpoint.open(root)
    assert store.from_cache
    assert data.stat().st_ino == before


def test_an_interrupt_of_the_verification_stays_one(entry, checkpoint, monkeypatch):
    """Also where it comes while a thread starts that nobody waits for: it still reads when the map is closed."""
    views = []

    def interrupted(mapping, *_):
        views.append(memoryview(mapping))
        raise KeyboardInterrupt

    monkeypatch.setattr(packed_file, "_verify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.open(entry[0])
    views[0].release()
