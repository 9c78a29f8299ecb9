"""Qwen3: Qwen2 without its biases, with a norm over each head of q and k."""

from __future__ import annotations

from dataclasses import replace

from octavo.models.config_reader import ConfigReader
from octavo.models.qwen2 import NAMES, last_layers_windowed
from octavo.models.rope import read_positions
from octavo.models.spec import ModelSpec
from octavo.models.standard import read_layer, read_model, read_rms_norm, with_biases

__all__ = ["NAMES", "build"]


def build(config: ConfigReader) -> ModelSpec:
    positions, norm = read_positions(config, max_position=32768), read_rms_norm(config)
    layer = read_layer(config, positions, norm, head_dim=128)
    layer = with_biases(layer, attention=config.flag("attention_bias", False))
    layer = replace(layer, mixer=replace(layer.mixer, qk_norm=norm))
    return read_model(config, "qwen3", last_layers_windowed(config, layer), positions, norm)
