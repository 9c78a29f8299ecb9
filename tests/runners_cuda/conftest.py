"""Kernels run on a card where there is one, else in Triton's interpreter.

It has to be chosen before they are imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

ON_CARD = torch.cuda.is_available()
if find_spec("triton") is None:  # macOS and aarch64 have none
    collect_ignore_glob = ["test_*.py"]
elif not ON_CARD:
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_and_index(tensor: Any, scope: Any) -> None:
        # Triton 3.6 takes int() of arrays of shape [1], which numpy 2.4 refuses.
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_and_index


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if ON_CARD else "cpu")


@pytest.fixture
def randn(device: torch.device) -> Callable[..., torch.Tensor]:
    """Normal values, the same ones on every device."""
    generator = torch.Generator().manual_seed(11)
    return lambda *shape: torch.randn(shape, generator=generator).to(device)


@pytest.fixture
def pack(device: torch.device) -> Callable[..., Any]:
    """(format, rows, columns) -> a random matrix on the device, and its dequantized values fp32 [N, C]."""
    from octavo.models.parameters import Parameter
    from octavo.quant.codebook import Codebook
    from octavo.quant.format import Bundle
    from octavo.runners.cuda.device_model import Matrix
    from octavo.runners.cuda.layout import CUDA_B64, encoding_of, padded

    def make(format: Any, rows: int, columns: int, bias: torch.Tensor | None = None) -> Any:
        weight = np.random.default_rng(3).normal(0, columns**-0.5, (rows, columns)).astype(np.float32)
        logical = random_arrays(format, rows, columns) if format_is_stored(format) else format.pack(weight)
        parameter = Parameter("head.weight", (rows, columns), "matrix", "head")
        arrays = CUDA_B64.arrange(Bundle("head", (parameter,)), [(format, logical)])
        encoding = encoding_of(format)
        assert encoding is not None
        matrix = Matrix(
            encoding,
            rows,
            padded(columns),
            _tensor(arrays["head_codes"], encoding.codec).to(device),
            _tensor(arrays["head_scales"], "").to(device) if "head_scales" in arrays else torch.empty(0),
            bias,
            torch.from_numpy(format.values.copy()).to(device) if isinstance(format, Codebook) else None,
        )
        values = torch.from_numpy(format.unpack(logical, columns).copy())
        values = torch.nn.functional.pad(values, (0, padded(columns) - columns))
        return matrix, values.to(device)

    return make


def format_is_stored(format: Any) -> bool:
    """Whether only checkpoints hold it: nothing is packed to it."""
    return getattr(format, "rounding", "") is None


def random_arrays(format: Any, rows: int, columns: int) -> dict[str, np.ndarray]:
    """Arrays of a format, of any codes and of scales that give weights of about columns ** -0.5."""
    from octavo.quant.nibbles import join_nibbles
    from octavo.quant.scales import SCALE_DTYPES, is_two_level

    source = np.random.default_rng(4)
    codes = source.integers(0, 1 << format.bits, (rows, columns)).astype(np.uint8)
    groups = format.groups(columns)
    spread = columns**-0.5 / 2 ** (format.bits - 1)
    arrays = {}
    for name in ("scales", "minimums"):
        if name == "minimums" and getattr(format, "zero", "") != "minimum":
            continue
        if is_two_level(format.scales):
            arrays[name] = source.integers(20, 64, (rows, groups)).astype(SCALE_DTYPES[format.scales])
            shared = source.uniform(0.5, 1.5, (rows, -(-columns // 256))) * spread / 40
            arrays[f"super_{name}"] = shared.astype(np.float16)
        else:
            values = source.uniform(0.5, 1.5, (rows, groups)) * spread
            arrays[name] = values.astype(SCALE_DTYPES[format.scales])
    if getattr(format, "table", "") == "e4m3":
        codes[codes & 0x7F == 0x7F] = 0  # no numbers
    if hasattr(format, "zero"):
        if format.zero == "integer":
            arrays["zeros"] = source.integers(0, 8, (rows, groups)).astype(np.int8)
        if format.bits == 8:
            codes = codes.view(np.int8)
    return {"codes": codes if format.bits == 8 else join_nibbles(codes)} | arrays


def _tensor(array: np.ndarray, codec: str) -> torch.Tensor:
    """The element types that kernels load."""
    flat = torch.from_numpy(np.ascontiguousarray(array).reshape(-1))
    if codec and flat.element_size() == 1:
        return flat.view(torch.int32)
    return flat.view(torch.bfloat16) if codec == "bf16" else flat


@pytest.fixture(scope="session")
def tiny_models() -> ModuleType:
    """tests/shared/tiny_models.py."""
    return import_module("tiny_models")
