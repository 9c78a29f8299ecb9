"""Qwen3 MoE: Qwen3 with a mixture of experts for the MLP of all layers, or of some."""

from __future__ import annotations

from dataclasses import replace

from octavo.models.config_reader import ConfigReader
from octavo.models.qwen2 import NAMES
from octavo.models.rope import read_positions
from octavo.models.spec import ModelSpec
from octavo.models.standard import (
    read_experts,
    read_layer,
    read_model,
    read_rms_norm,
    with_biases,
    with_window,
)

__all__ = ["NAMES", "build"]


def build(config: ConfigReader) -> ModelSpec:
    positions, norm = read_positions(config, max_position=32768), read_rms_norm(config)
    # Unlike Qwen3's, its window is over all layers.
    window = config.optional_integer("sliding_window", 4096)
    config.raw("max_window_layers")
    dense = with_biases(read_layer(config, positions, norm), attention=config.flag("attention_bias", False))
    dense = replace(dense, mixer=replace(dense.mixer, qk_norm=norm))
    if config.flag("use_sliding_window", False):
        dense = with_window(dense, window)
    ffn = read_experts(
        config,
        hidden_size=config.integer("moe_intermediate_size", 768),
        experts=128,
        taken=8,
        normalized=config.flag("norm_topk_prob", False),
    )
    sparse, every = replace(dense, ffn=ffn), config.integer("decoder_sparse_step", 1)
    dense_layers = config.raw("mlp_only_layers", [])
    if not isinstance(dense_layers, list):
        raise config.unsupported("mlp_only_layers", "is not a list of layers")
    layers = [dense if i in dense_layers or (i + 1) % every else sparse for i in range(config.layer_count())]
    return read_model(config, "qwen3_moe", layers, positions, norm)
