"""OLMo 2: norms only after the blocks, and one over the whole width of q and of k."""

from __future__ import annotations

from dataclasses import replace

from octavo.models.config_reader import ConfigReader
from octavo.models.naming import PRE_AND_POST_NORMS, FamilyNames
from octavo.models.rope import Positions, read_positions
from octavo.models.spec import LayerNorms, LayerSpec, ModelSpec
from octavo.models.standard import read_layer, read_model, read_rms_norm, with_biases

NAMES = FamilyNames(*PRE_AND_POST_NORMS)


def build(config: ConfigReader) -> ModelSpec:
    positions, norm = read_positions(config), read_rms_norm(config, 1e-5)
    layer = read_olmo_layer(config, positions)
    return read_model(config, "olmo2", [layer] * config.layer_count(), positions, norm)


def read_olmo_layer(config: ConfigReader, positions: Positions) -> LayerSpec:
    norm = read_rms_norm(config, 1e-5)
    layer = with_biases(read_layer(config, positions, norm), attention=config.flag("attention_bias", False))
    return replace(
        layer,
        norms=LayerNorms(pre_mixer=None, post_mixer=norm, pre_ffn=None, post_ffn=norm),
        mixer=replace(layer.mixer, qk_norm=norm, qk_norm_scope="full"),
    )
