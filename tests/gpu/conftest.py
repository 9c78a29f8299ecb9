"""The tiny models of every structural flag that the native CPU runner is tested with, and a Gemma-2 in a folder."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM


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


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    config = Gemma2Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=48,
        max_position_embeddings=1024,
    )
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)  # wide enough that near-ties are rare
    folder = tmp_path_factory.mktemp("gemma2")
    model.save_pretrained(folder)
    return folder
