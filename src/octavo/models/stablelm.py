"""StableLM: Llama with layer norms, biases on q, k and v as an option, rope over a quarter of each head, and both
blocks side by side as an option."""

from __future__ import annotations

from dataclasses import replace

from octavo.models.config_reader import ConfigReader
from octavo.models.naming import PRE_NORMS, FamilyNames
from octavo.models.rope import read_positions
from octavo.models.spec import ModelSpec, Norm
from octavo.models.standard import read_layer, read_model

NAMES = FamilyNames(*PRE_NORMS)


def build(config: ConfigReader) -> ModelSpec:
    positions = read_positions(config, max_position=4096, partial=0.25)
    norm = Norm("layernorm", config.positive("layer_norm_eps", 1e-5), bias=True)
    if config.flag("qk_layernorm", False):
        raise config.unsupported("qk_layernorm", "gives each head a norm of its own")
    layer = read_layer(config, positions, norm)
    layer = replace(layer, mixer=replace(layer.mixer, qkv_bias=config.flag("use_qkv_bias", False)))
    if config.flag("use_parallel_residual", False):
        layer = replace(layer, parallel=True, norms=replace(layer.norms, pre_ffn=None))
    return read_model(config, "stablelm", [layer] * config.layer_count(), positions, norm)
