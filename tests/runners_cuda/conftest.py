"""Kernels run on a card where there is one, else in Triton's interpreter.

It has to be chosen before they are imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
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
    from octavo.quant.format import Bundle
    from octavo.runners.cuda.device_model import Matrix
    from octavo.runners.cuda.layout import CUDA_B64, encoding_of, padded

    def make(format: Any, rows: int, columns: int, bias: torch.Tensor | None = None) -> Any:
        weight = np.random.default_rng(3).normal(0, columns**-0.5, (rows, columns)).astype(np.float32)
        logical = format.pack(weight)
        parameter = Parameter("head.weight", (rows, columns), "matrix", "head")
        arrays = CUDA_B64.arrange(Bundle("head", (parameter,)), [(format, logical)])
        encoding = encoding_of(format)
        assert encoding is not None
        matrix = Matrix(
            encoding,
            rows,
            padded(columns),
            _flat(arrays["head_codes"], encoding.codec).to(device),
            _flat(arrays["head_scales"], encoding.codec).to(device)
            if "head_scales" in arrays
            else torch.empty(0),
            bias,
        )
        values = torch.from_numpy(format.unpack(logical, columns).copy())
        values = torch.nn.functional.pad(values, (0, padded(columns) - columns))
        return matrix, values.to(device)

    return make


def _flat(array: np.ndarray, codec: str) -> torch.Tensor:
    """The element types that kernels load."""
    flat = torch.from_numpy(np.ascontiguousarray(array).reshape(-1))
    if codec in ("i8", "u4") and flat.element_size() == 1:
        return flat.view(torch.int32)
    if codec == "u4":
        return flat.view(torch.int32)
    return flat.view(torch.bfloat16) if codec == "bf16" else flat


@pytest.fixture(scope="session")
def tiny_models() -> ModuleType:
    """tests/runners_cpu/conftest.py: MODELS, make_tiny, Driver, runner_config."""
    path = Path(__file__).parents[1] / "runners_cpu" / "conftest.py"
    spec = spec_from_file_location("tiny_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["tiny_models"] = module
    spec.loader.exec_module(module)
    return module
