"""Models of which one projection is a quantized module, written by the library that defined its format."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import MistralConfig, MistralForCausalLM

HEADS, HEAD_DIM = 4, 16
MODULE = "self_attn.q_proj"


@dataclass(frozen=True)
class Checkpoint:
    """A folder, and the model with the weights that the library says are in it."""

    folder: Path
    truth: MistralForCausalLM

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """Of each token but the first, by transformers in fp32."""
        with torch.inference_mode():
            logits = self.truth(torch.tensor([ids]), use_cache=False).logits[0]
        return logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]


def stored(stem: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor]:
    """quantization_config, the module's tensors, its weights: of a file in `checkpoints`, or of 8-bit floats."""
    if stem.startswith("f"):
        return float8(stem)
    with safe_open(Path(__file__).parent / "checkpoints" / f"{stem}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["quantization_config"])
        names = [name for name in file.keys() if name.startswith("q.")]  # noqa: SIM118  # no mapping
        parts = {name[2:]: file.get_tensor(name) for name in names}
        return config, parts, file.get_tensor("expected.q")


def float8(stem: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor]:
    """`fp8-64`: a scale for each block of 64 x 64; `fbgemm_fp8`: one for each row."""
    method, _, block = stem.partition("-")
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(64, 128, generator=generator).to(torch.float8_e4m3fn)
    grid = (64 // int(block), 128 // int(block)) if block else (64, 1)
    scale = 0.05 + 0.1 * torch.rand(grid, generator=generator)
    spread = scale.repeat_interleave(64 // grid[0], 0).repeat_interleave(128 // grid[1], 1)
    config: dict[str, Any] = {"quant_method": method}
    if block:
        config |= {"activation_scheme": "dynamic", "weight_block_size": [int(block)] * 2}
    return (
        config,
        {"weight": weight, "weight_scale_inv" if block else "weight_scale": scale},
        weight.float() * spread,
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[str], Checkpoint]:
    def make(stem: str) -> Checkpoint:
        quantization, parts, weight = stored(stem)
        assert len(weight) == HEADS * HEAD_DIM
        config = MistralConfig(
            vocab_size=96,
            hidden_size=weight.shape[1],
            intermediate_size=112,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            head_dim=HEAD_DIM,
            sliding_window=None,
            max_position_embeddings=128,
            eos_token_id=None,
            bos_token_id=None,
            initializer_range=0.2,
        )
        torch.manual_seed(11)
        truth = MistralForCausalLM(config).eval()
        for layer in truth.model.layers:
            layer.self_attn.q_proj.weight.data = weight
        tensors = {
            name: tensor.contiguous()
            for name, tensor in truth.state_dict().items()
            if not name.endswith(f"{MODULE}.weight")
        }
        for layer in range(config.num_hidden_layers):
            tensors |= {f"model.layers.{layer}.{MODULE}.{name}": part.clone() for name, part in parts.items()}
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        written = config.to_dict() | {"quantization_config": quantization}
        (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
        return Checkpoint(tmp_path, truth)

    return make
