"""Mixtral: Mistral with a mixture of experts for its MLP."""

from __future__ import annotations

from dataclasses import replace

from octavo.models import llama
from octavo.models.config_reader import ConfigReader
from octavo.models.rope import read_positions
from octavo.models.spec import ModelSpec
from octavo.models.standard import read_experts, read_layer, read_model, read_rms_norm, with_window

NAMES = replace(
    llama.NAMES,
    huggingface={
        "ffn.router": "block_sparse_moe.gate",
        "ffn.experts.gate": "block_sparse_moe.experts.{}.w1.weight",
        "ffn.experts.up": "block_sparse_moe.experts.{}.w3.weight",
        "ffn.experts.down": "block_sparse_moe.experts.{}.w2.weight",
    },
)


def build(config: ConfigReader) -> ModelSpec:
    positions = read_positions(config, base=1_000_000.0, max_position=4096 * 32)
    norm = read_rms_norm(config, 1e-5)
    layer = with_window(read_layer(config, positions, norm), config.optional_integer("sliding_window"))
    width = config.integer("intermediate_size")
    ffn = read_experts(config, hidden_size=width, experts=8, taken=2, normalized=True)
    layers = [replace(layer, ffn=ffn)] * config.layer_count()
    return read_model(config, "mixtral", layers, positions, norm)
