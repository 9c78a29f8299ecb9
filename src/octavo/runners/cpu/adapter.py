"""A LoRA adapter as the library reads it: an addend for every linear of every layer, and one for the head.

Shape letters: N output rows, K input columns, R rank.
"""

from __future__ import annotations

import numpy as np

from octavo.runners.base import Adapter
from octavo.runners.cpu import library

_LINEARS = ("mixer.q", "mixer.k", "mixer.v", "mixer.o", "ffn.gate", "ffn.up", "ffn.down")
"""In the order of OctavoLinear."""


class NativeAdapter:
    """The struct, and everything its pointers lead to."""

    def __init__(self, adapter: Adapter, layers: int) -> None:
        """`adapter` fits the model: `octavo.runners.adapters`."""
        self._kept: list[np.ndarray] = []
        self._addends = (library.Addend * (layers * len(_LINEARS) + 1))()
        for name, (a, b) in adapter.addends.items():
            self._fill(self._addends[_place(name, layers)], a, b)
        ranks = [a.shape[0] for a, _ in adapter.addends.values()]
        self.struct = library.AdapterStruct(addends=self._addends, rank=max(ranks, default=0))
        self.nbytes = sum(array.nbytes for array in self._kept)

    def _fill(self, addend: library.Addend, a: np.ndarray, b: np.ndarray) -> None:
        a, b = np.array(a, np.float32, order="C"), np.array(b.T, np.float32, order="C")
        self._kept += [a, b]
        addend.a, addend.b = a.ctypes.data, b.ctypes.data
        addend.rank, addend.columns, addend.rows = a.shape[0], a.shape[1], b.shape[1]


def _place(name: str, layers: int) -> int:
    if name == "head.weight":
        return layers * len(_LINEARS)
    _, layer, linear = name.removesuffix(".weight").split(".", 2)
    return int(layer) * len(_LINEARS) + _LINEARS.index(linear)
