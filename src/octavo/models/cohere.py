"""Cohere's Command R: both blocks side by side on one layer norm without bias, adjacent rotary pairs, and a
multiplier on the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from octavo.models.config_reader import ConfigReader
from octavo.models.naming import PRE_NORMS, FamilyNames
from octavo.models.rope import Positions, read_positions
from octavo.models.spec import LayerSpec, ModelSpec, Norm
from octavo.models.standard import read_layer, read_model, with_biases

NAMES = FamilyNames(*PRE_NORMS, adjacent_rotary_pairs=True)


def build(config: ConfigReader) -> ModelSpec:
    positions = read_positions(config, base=500_000.0, max_position=8192)
    layer = read_cohere_layer(config, positions)
    # Command R was made for more tokens than its max_position_embeddings says.
    most = config.integer("model_max_length", positions.max_context_tokens)
    layers = [layer] * config.layer_count()
    return replace(read_cohere_model(config, "cohere", layers, positions), max_context_tokens=most)


def read_cohere_layer(config: ConfigReader, positions: Positions) -> LayerSpec:
    if config.flag("use_qk_norm", False):
        raise config.unsupported("use_qk_norm", "gives each head a norm of its own")
    layer = read_layer(config, positions, _read_norm(config))
    layer = with_biases(layer, attention=config.flag("attention_bias", False))
    return replace(layer, parallel=True, norms=replace(layer.norms, pre_ffn=None))


def read_cohere_model(
    config: ConfigReader, family: str, layers: Sequence[LayerSpec], positions: Positions
) -> ModelSpec:
    model = read_model(config, family, layers, positions, _read_norm(config), tied=True)
    return replace(model, logits_multiplier=config.positive("logit_scale", 0.0625))


def _read_norm(config: ConfigReader) -> Norm:
    return Norm("layernorm", config.positive("layer_norm_eps", 1e-5))
