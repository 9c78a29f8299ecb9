"""Weights copied to huge pages are the same weights, where it pays and there is room."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from octavo.devices import read_machine
from octavo.runners.cpu import huge_pages
from octavo.runners.cpu.huge_pages import copied, in_huge_pages, is_offered
from octavo.runners.cpu.layout import CpuLayout


class Mapped:
    """A store whose pages a file backs, as far as `huge_pages` looks; remembers what was given back."""

    is_mapped = True

    def __init__(self, weights: Any) -> None:
        self._weights = weights
        self.nbytes = weights.nbytes
        self.dropped: list[str] = []

    def values(self) -> Any:
        return self._weights.values()

    def drop_pages(self, name: str) -> None:
        self.dropped.append(name)


@pytest.fixture
def mapped(flags, tiny) -> Mapped:
    return Mapped(tiny(next(iter(flags.values()))).open(CpuLayout(8)))


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for pages")
def test_copies_hold_the_same_bytes_and_give_the_file_back(mapped):
    found = copied(mapped)
    assert list(found) == [bundle.name for bundle in mapped.values()]
    assert sorted(mapped.dropped) == sorted(found)
    for bundle in mapped.values():
        for name, array in bundle.arrays.items():
            copy = found[bundle.name].arrays[name]
            assert copy.dtype == array.dtype
            assert np.array_equal(copy.view(np.uint8), array.view(np.uint8))
            assert copy.ctypes.data % 64 == 0
            assert not copy.flags.writeable
            assert not np.shares_memory(copy, array)


@pytest.mark.parametrize(
    ("text", "offered"),
    [("always [madvise] never", True), ("[always] madvise never", True), ("always madvise [never]", False)],
)
def test_the_system_says_whether_it_offers_them(tmp_path, text, offered):
    (tmp_path / "enabled").write_text(text + "\n")
    assert is_offered(tmp_path / "enabled") is offered
    assert not is_offered(tmp_path / "missing")


@pytest.mark.skipif(not is_offered(), reason="this machine offers no huge pages")
def test_copied_only_where_it_pays_and_fits(mapped, monkeypatch):
    assert in_huge_pages(mapped) is mapped  # too small
    monkeypatch.setattr(huge_pages, "_LEAST_BYTES", 0)
    assert in_huge_pages(mapped) is not mapped
    machine = read_machine("cpu")
    for available, stays in ((3 * mapped.nbytes - 1, True), (3 * mapped.nbytes, False)):
        tight = replace(machine, available_bytes=available)
        monkeypatch.setattr(huge_pages, "read_machine", lambda _, tight=tight: tight)
        assert (in_huge_pages(mapped) is mapped) is stays
    mapped.is_mapped = False  # in memory already: a copy would be a second one
    assert in_huge_pages(mapped) is mapped
