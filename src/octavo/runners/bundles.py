"""Which parameters lie together in a packed file, and under what names: the same for every layout of our kernels.

q, k and v are one bundle, gate and up another; norms and biases are one array of fp32. How a bundle's matrices
are arranged is the layout's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from octavo.models.parameters import Parameter

ALIGNMENT_BYTES = 64
"""Of each vector's place."""
VECTORS = "vectors"
"""Name of the bundle of all norms and biases, and of its one array."""

_LAYER_MATRIX = re.compile(
    r"(layers\.\d+)\.(?:mixer|ffn(\.experts\.\d+)?)\.(q|k|v|o|gate|up|down|router)\.weight"
)
_TOGETHER = {
    "q": "qkv",
    "k": "qkv",
    "v": "qkv",
    "o": "o",
    "gate": "gate_up",
    "up": "gate_up",
    "down": "down",
    "router": "router",
}


def bundle_name(parameter: Parameter) -> str:
    """`embedding`, `head`, `layers.{i}.qkv|o|gate_up|down|router`, `layers.{i}.experts.{e}.gate_up|down`, or
    `vectors`."""
    if parameter.role == "vector":
        return VECTORS
    layer = _LAYER_MATRIX.fullmatch(parameter.name)
    if layer is None:
        return parameter.name.removesuffix(".weight")
    return f"{layer[1]}{layer[2] or ''}.{_TOGETHER[layer[3]]}"


def part_name(parameter: Parameter) -> str:
    """The array of one matrix in its bundle: `q`, `gate`, `embedding`, ..."""
    return parameter.name.removesuffix(".weight").rpartition(".")[2]


def vector_places(parameters: Sequence[Parameter]) -> Iterator[tuple[Parameter, int]]:
    """Where each vector starts in the array `vectors`, in values."""
    start = 0
    for parameter in parameters:
        yield parameter, start
        start += _round_up(parameter.shape[0], ALIGNMENT_BYTES // 4)


def padded_vector(values: np.ndarray) -> np.ndarray:
    padded = np.zeros(_round_up(len(values), ALIGNMENT_BYTES // 4), np.float32)
    padded[: len(values)] = values
    return padded


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
