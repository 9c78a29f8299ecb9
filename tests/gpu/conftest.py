"""The tiny models of every structural flag that the native CPU runner is tested with, and a Gemma-2 in a folder."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import tiny_models
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM


@pytest.fixture(scope="session")
def models() -> ModuleType:
    """MODELS, make_tiny, Driver, runner_config."""
    return tiny_models


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
