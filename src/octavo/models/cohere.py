"""Cohere's Command R: both blocks side by side on one layer norm without bias, adjacent rotary pairs, and a
multiplier on the logits."""

from __future__ import annotations

from dataclasses import replace

from octavo.models.config_reader import ConfigReader
from octavo.models.naming import PRE_NORMS, FamilyNames
from octavo.models.rope import read_positions
from octavo.models.spec import ModelSpec, Norm
from octavo.models.standard import read_layer, read_model, with_biases

NAMES = FamilyNames(*PRE_NORMS, adjacent_rotary_pairs=True)


def build(config: ConfigReader) -> ModelSpec:
    positions = read_positions(config, base=500_000.0, max_position=8192)
    norm = Norm("layernorm", config.positive("layer_norm_eps", 1e-5))
    if config.flag("use_qk_norm", False):
        raise config.unsupported("use_qk_norm", "gives each head a norm of its own")
    layer = with_biases(read_layer(config, positions, norm), attention=config.flag("attention_bias", False))
    layer = replace(layer, parallel=True, norms=replace(layer.norms, pre_ffn=None))
    model = read_model(config, "cohere", [layer] * config.layer_count(), positions, norm, tied=True)
    return replace(
        model,
        # Command R was made for more tokens than its max_position_embeddings says.
        max_context_tokens=config.integer("model_max_length", model.max_context_tokens),
        logits_multiplier=config.positive("logit_scale", 0.0625),
    )
