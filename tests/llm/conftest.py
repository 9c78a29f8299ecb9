"""A tiny random model in a folder without a tokenizer: enough for everything that is not text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from octavo import LLM

VOCABULARY = 128


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=None,
        bos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> Iterator[LLM]:
    with LLM(tiny_folder, device="cpu", cache=False, context=256, max_sequences=4) as llm:
        yield llm


@pytest.fixture(scope="module")
def default_llm(default_model_path: Path) -> Iterator[LLM]:
    with LLM(default_model_path, quant="int8", device="cpu", context=1024, max_sequences=2) as llm:
        yield llm
