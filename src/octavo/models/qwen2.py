"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and a window over the last layers where it is used."""

from __future__ import annotations

from dataclasses import replace

from octavo.models.config_reader import ConfigReader
from octavo.models.naming import PRE_NORMS, FamilyNames
from octavo.models.rope import read_positions
from octavo.models.spec import LayerSpec, ModelSpec
from octavo.models.standard import read_layer, read_layers_by_type, read_model, read_rms_norm, with_window

NAMES = FamilyNames(*PRE_NORMS)


def build(config: ConfigReader) -> ModelSpec:
    positions, norm = read_positions(config, max_position=32768), read_rms_norm(config)
    layer = read_layer(config, positions, norm)
    layer = replace(layer, mixer=replace(layer.mixer, qkv_bias=True))
    return read_model(config, "qwen2", last_layers_windowed(config, layer), positions, norm)


def last_layers_windowed(config: ConfigReader, layer: LayerSpec) -> list[LayerSpec]:
    """All layers: those from `max_window_layers` on are windowed, if `use_sliding_window`."""
    count, window = config.layer_count(), config.optional_integer("sliding_window", 4096)
    first = config.integer("max_window_layers", 28, least=0)
    kinds = {"full_attention": layer}
    if config.flag("use_sliding_window", False) and window is not None:
        kinds["sliding_attention"] = with_window(layer, window)
    else:
        first = count
    return read_layers_by_type(
        config, kinds, ["full_attention" if i < first else "sliding_attention" for i in range(count)]
    )
