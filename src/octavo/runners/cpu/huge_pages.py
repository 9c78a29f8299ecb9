"""Packed weights in pages of 2 MiB, where the system offers them and there is memory to spare.

A token reads all weights once, front to back. In pages of 4 KiB, which is what a mapped file has, finding the pages
costs a third of that time (docs/performance.md), so the arrays are copied, and the file's pages given back.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from octavo.devices import read_machine
from octavo.runners.bundles import ALIGNMENT_BYTES
from octavo.weights import StoredBundle, WeightStore

_HUGE_PAGE_BYTES = 2 << 20
_LEAST_BYTES = 32 << 20
"""Less than this may stay in the processor's own caches."""
_SPARE = 3
"""So many times the weights must be free: a plan counts them once, whether mapped or copied."""
_THREADS = 8
_OFFERED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def in_huge_pages(weights: WeightStore) -> Mapping[str, StoredBundle]:
    """The bundles in memory of their own, read-only; `weights` as they are where that does not pay."""
    if not weights.is_mapped or weights.nbytes < _LEAST_BYTES or not is_offered():
        return weights
    if read_machine("cpu").available_bytes < _SPARE * weights.nbytes:
        return weights
    try:
        return copied(weights)
    except (OSError, AttributeError):  # no more address space, or a sandbox or a Python without the advice
        return weights


def is_offered(offered: Path = _OFFERED) -> bool:
    """Whether memory gets huge pages if it asks for them."""
    try:
        return "[never]" not in offered.read_text()
    except OSError:  # not Linux, or built without them
        return False


def copied(weights: WeightStore) -> dict[str, StoredBundle]:
    """All bundles one after another, each array at a multiple of 64 bytes, in memory that asks for huge pages.

    What is copied is given back at once, so that no more is resident than before.
    """
    places: dict[tuple[str, str], int] = {}
    end = 0
    for bundle in weights.values():
        for name, array in bundle.arrays.items():
            places[bundle.name, name] = end
            end += -(-array.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    memory = _memory(end)

    def copy(bundle: StoredBundle) -> StoredBundle:
        arrays = {}
        for name, array in bundle.arrays.items():
            start = places[bundle.name, name]
            target = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
            np.copyto(target, array)
            target.flags.writeable = False
            arrays[name] = target
        weights.drop_pages(bundle.name)
        return replace(bundle, arrays=arrays)

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "octavo-copy") as pool:
        return {bundle.name: bundle for bundle in pool.map(copy, weights.values())}


def _memory(nbytes: int) -> np.ndarray:
    """uint8 [nbytes], zeros, from a huge page's first byte on."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = mmap.mmap(-1, nbytes + _HUGE_PAGE_BYTES, flags=private)
    pages.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(pages, np.uint8)
    first = -memory.ctypes.data % _HUGE_PAGE_BYTES
    return memory[first : first + nbytes]
