"""Small checkpoints in memory, and ways to open them. Scripts of child processes import this file too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo.models.parameters import Parameter
from octavo.quant import REF1, stored_format
from octavo.quant.format import Layout
from octavo.types import Progress
from octavo.weights import WeightStore, choose_formats, open_weights


@dataclass(frozen=True)
class ArrayTensor:
    """A TensorRef over values in memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: np.ndarray = field(repr=False)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def read(self) -> np.ndarray:
        return self.values


@dataclass(frozen=True)
class Checkpoint:
    parameters: tuple[Parameter, ...]
    tensors: Mapping[str, ArrayTensor]
    fingerprint: str = "f" * 64

    def open(
        self,
        cache: Path | None,
        *,
        quant: str = "auto",
        layout: Layout = REF1,
        progress: Progress | None = None,
        fingerprint: str | None = None,
    ) -> WeightStore:
        return open_weights(
            model="tiny",
            fingerprint=fingerprint or self.fingerprint,
            tensors=self.tensors,
            parameters=self.parameters,
            formats=choose_formats(self.parameters, self.tensors, quant),
            layout=layout,
            cache_dir=cache,
            use_cache=cache is not None,
            progress=progress,
        )


def make_checkpoint(rows: int = 24, columns: int = 96, layers: int = 2, seed: int = 0) -> Checkpoint:
    """An embedding, and in each layer two matrices, one of odd width, and a norm; bfloat16."""
    random = np.random.default_rng(seed)
    parameters: list[Parameter] = []
    tensors: dict[str, ArrayTensor] = {}

    def add(name: str, shape: tuple[int, ...], role: Any) -> None:
        # Bit patterns of bfloat16 between 2**-8 and 1.
        values = (
            random.integers(0x3B80, 0x3F80, shape, np.uint16) | random.integers(0, 2, shape, np.uint16) << 15
        )
        tensors[f"model.{name}"] = ArrayTensor(f"model.{name}", "bf16", shape, values)
        parameters.append(Parameter(name, shape, role, f"model.{name}"))

    add("embedding.weight", (2 * rows, columns), "embedding")
    for layer in range(layers):
        add(f"layers.{layer}.mixer.q.weight", (rows, columns), "matrix")
        add(f"layers.{layer}.ffn.down.weight", (rows, columns + 3), "matrix")
        add(f"layers.{layer}.norms.pre_mixer.weight", (columns + 1,), "vector")
    return Checkpoint(tuple(parameters), tensors)


def content(store: WeightStore) -> dict[str, np.ndarray]:
    """Every array of a store, copied."""
    return {
        f"{bundle}.{name}": array.copy() for bundle in store for name, array in store[bundle].arrays.items()
    }


def assert_same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype
        np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    return make_checkpoint()


@pytest.fixture(scope="session")
def expected(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """What `checkpoint` packs to, made without a cache."""
    return content(checkpoint.open(None))


@pytest.fixture(name="content")
def content_fixture() -> Callable[[WeightStore], dict[str, np.ndarray]]:
    return content


@pytest.fixture(name="assert_same")
def assert_same_fixture() -> Callable[..., None]:
    return assert_same


@pytest.fixture
def make_tensor() -> Callable[[str, np.ndarray], ArrayTensor]:
    """(dtype, float32 weights) -> a tensor that stores them."""

    def make(dtype: str, weight: np.ndarray, name: str = "source") -> ArrayTensor:
        if dtype in ("q8_0", "q4_1"):
            from gguf import GGMLQuantizationType
            from gguf.quants import quantize

            raw = quantize(weight, GGMLQuantizationType[dtype.upper()])
        else:
            form = stored_format(dtype)
            assert form is not None
            raw = form.pack(weight)["values"]
        return ArrayTensor(name, dtype, weight.shape, raw)

    return make
