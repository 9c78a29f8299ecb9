"""The tiny models of every structural flag that the native CPU runner is tested with, for the CUDA runner."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def models() -> ModuleType:
    """tests/runners_cpu/conftest.py: MODELS, make_tiny, Driver, runner_config."""
    path = Path(__file__).parents[1] / "runners_cpu" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tiny_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_models"] = module
    spec.loader.exec_module(module)
    return module
