"""Cohere 2: Command R with three windowed layers to a full one, which has no rope."""

from __future__ import annotations

from dataclasses import replace

from octavo.models.cohere import NAMES, read_cohere_layer, read_cohere_model
from octavo.models.config_reader import ConfigReader
from octavo.models.rope import read_positions
from octavo.models.spec import ModelSpec
from octavo.models.standard import each_full, read_windowed_layers

__all__ = ["NAMES", "build"]

_ALWAYS = {
    "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
}
"""What the published configs say beside transformers' own keys, and what the family is anyway."""


def build(config: ConfigReader) -> ModelSpec:
    for key, value in _ALWAYS.items():
        if config.raw(key, value) != value:
            raise config.unsupported(key, f"is not {value}")
    config.raw("use_parallel_embedding")  # how the training was spread over devices
    positions = read_positions(config, max_position=8192)
    layer = read_cohere_layer(config, positions)
    full = replace(layer, mixer=replace(layer.mixer, rope=None))
    every = config.integer("sliding_window_pattern", 4)
    if config.integer("layer_switch", every) != every:
        raise config.unsupported("layer_switch", "differs from sliding_window_pattern")
    layers = read_windowed_layers(config, full, layer, each_full(every, config.layer_count()))
    return read_cohere_model(config, "cohere2", layers, positions)
