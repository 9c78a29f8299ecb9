"""The Format contract: how a logical matrix is stored as a few named arrays, and how many bytes that is.

A format is an object stored with the weights, never guessed from a name. Arrays are numpy, in the logical
layout (rows of the matrix, in order; layout id `ref-1`); a runner's own layout is made from these.
Shape letters: N output rows, K input columns, G group size; groups = ceil(K / G).

| format   | arrays                                                                    | weight =                |
|----------|---------------------------------------------------------------------------|-------------------------|
| plain    | values [N, K] f32 / f16 / bf16 (as uint16 bit patterns)                   | values                  |
| affine 8 | codes int8 [N, K]; scales [N, groups]; minimums or zeros, or none         | see `Affine`            |
| affine 4 | codes uint8 [N, ceil(K / 2)], low nibble = even column; the rest as above |                         |
| codebook | codes uint8 as affine's, [N, K] at 8 bits; scales [N, groups]             | table[code] * scale     |

Two-level scales have a float16 every 256 columns beside them, joint ones hold the minimum: `octavo.quant.scales`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from octavo.models.parameters import Parameter

if TYPE_CHECKING:
    import numpy as np

Packed = Mapping[str, "np.ndarray"]


class Format(Protocol):
    """A frozen dataclass (Plain, Affine, Codebook); runners dispatch on its class and fields."""

    @property
    def name(self) -> str:
        """What a user sees: int8, llm-int8, q4_1, bf16, ..."""

    def pack(self, weight: np.ndarray) -> dict[str, np.ndarray]:
        """float32 [N, K] -> arrays. Raises ModelFormatError where a value is not finite."""

    def unpack(self, packed: Packed, columns: int) -> np.ndarray:
        """Arrays -> float32 [N, columns], bit-equal to the dequantizer of the library that defined the format."""

    def select_rows(self, packed: Packed, rows: np.ndarray | slice) -> dict[str, np.ndarray]:
        """The packed form of weight[rows]: exact, since no format mixes rows."""

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of the packed arrays of a [rows, columns] matrix."""

    def to_manifest(self) -> dict[str, Any]:
        """JSON-able description; `octavo.quant.format_from_manifest` is its inverse."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """Parameters a layout stores together, because its kernels read them together (q, k and v, say)."""

    name: str
    parameters: tuple[Parameter, ...]


class Layout(Protocol):
    """How a runner wants packed arrays arranged in memory. Never depends on a tunable."""

    @property
    def id(self) -> str:
        """Part of the packed cache's key: ref-1, cpu-r8-1, ..."""

    def bundles(self, parameters: Sequence[Parameter]) -> tuple[Bundle, ...]:
        """A partition of the parameters, in load order."""

    def arrange(self, bundle: Bundle, packed: Sequence[tuple[Format, Packed]]) -> dict[str, np.ndarray]:
        """The arrays to store for this bundle, from its parameters' logical arrays, in order."""
