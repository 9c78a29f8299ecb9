"""An evaluation with known numbers, and a tiny random Llama."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from octavo.evaluate.divergence import Divergence
from octavo.evaluate.estimates import Estimate, Share
from octavo.evaluate.results import Evaluation, FormatQuality


@pytest.fixture
def evaluation() -> Evaluation:
    def quality(name: str, nbytes: int, speed: float | None, kl: float) -> FormatQuality:
        return FormatQuality(
            format=name,
            stored_as=name,
            weight_bytes=nbytes,
            bits_per_weight=8.25,
            device="cpu",
            runner="cpu",
            decode_tokens_per_second=speed,
            perplexity=Estimate(20.5, 0.25),
            divergence=Divergence(Estimate(kl, kl / 20), Share.of(970, 1000), (0.01, 0.03, 0.02), 1000),
        )

    return Evaluation(
        model="<tiny>",
        revision="abc",
        fingerprint="f" * 64,
        text="a & b",
        scored_tokens=1000,
        segment_tokens=512,
        reference="none",
        stored_as="q4_1",
        machine="x86_64",
        formats=(quality("int8", 140_000_000, 120.0, 2e-3), quality("int4", 80_000_000, None, 2e-2)),
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    torch.set_num_threads(1)
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return folder, model
