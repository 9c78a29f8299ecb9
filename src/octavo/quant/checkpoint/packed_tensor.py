"""A weight of a quantized checkpoint: its format, and its arrays once they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from octavo.quant.format import Format


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A `TensorRef` of exact float32 values for whoever does not know that it is packed."""

    name: str
    shape: tuple[int, ...]
    """[N, K]."""
    nbytes: int
    """Of all tensors in the file that hold it."""
    format: Format
    load: Callable[[], dict[str, np.ndarray]] = field(repr=False, compare=False)
    """Reads the arrays of `format`. Raises ModelFormatError where they are not what they should be."""

    @property
    def dtype(self) -> str:
        return "f32"

    def read(self) -> np.ndarray:
        """float32 [N, K], dequantized."""
        return self.format.unpack(self.load(), self.shape[-1])
