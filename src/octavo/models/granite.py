"""Granite: Llama with a multiplier on embeddings, scores, each block's output and the logits."""

from __future__ import annotations

from dataclasses import replace

from octavo.models.config_reader import ConfigReader
from octavo.models.llama import NAMES
from octavo.models.rope import read_positions
from octavo.models.spec import ModelSpec
from octavo.models.standard import read_layer, read_model, read_rms_norm, with_biases

__all__ = ["NAMES", "build"]


def build(config: ConfigReader) -> ModelSpec:
    positions, norm = read_positions(config), read_rms_norm(config)
    layer = with_biases(
        read_layer(config, positions, norm),
        attention=config.flag("attention_bias", False),
        mlp=config.flag("mlp_bias", False),
    )
    layer = replace(
        layer,
        mixer=replace(layer.mixer, scale=config.positive("attention_multiplier", 1.0)),
        residual_multiplier=config.positive("residual_multiplier", 1.0),
    )
    model = read_model(config, "granite", [layer] * config.layer_count(), positions, norm)
    return replace(
        model,
        embedding_multiplier=config.positive("embedding_multiplier", 1.0),
        logits_multiplier=1 / config.positive("logits_scaling", 1.0),
    )
