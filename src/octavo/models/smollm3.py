"""SmolLM3: Llama with every fourth layer without rope."""

from __future__ import annotations

from dataclasses import replace

from octavo.models.config_reader import ConfigReader
from octavo.models.llama import NAMES
from octavo.models.rope import read_positions
from octavo.models.spec import ModelSpec
from octavo.models.standard import (
    read_layer,
    read_layers_by_type,
    read_model,
    read_rms_norm,
    with_biases,
    with_window,
)

__all__ = ["NAMES", "build"]


def build(config: ConfigReader) -> ModelSpec:
    config.raw("max_window_layers")  # of the published config; transformers does not read it
    positions = read_positions(config, base=2_000_000.0, max_position=32768)
    norm, count = read_rms_norm(config), config.layer_count()
    layer = with_biases(
        read_layer(config, positions, norm),
        attention=config.flag("attention_bias", False),
        mlp=config.flag("mlp_bias", False),
    )
    every = config.integer("no_rope_layer_interval", 4)
    rotated = config.raw("no_rope_layers", [int((i + 1) % every != 0) for i in range(count)])
    if not isinstance(rotated, list) or len(rotated) < count or any(flag not in (0, 1) for flag in rotated):
        raise config.unsupported("no_rope_layers", f"does not say 0 or 1 for each of {count} layers")
    kinds, window = {"full_attention": layer}, config.optional_integer("sliding_window")
    uses_window = config.flag("use_sliding_window", False) and window is not None
    if window is not None:
        kinds["sliding_attention"] = with_window(layer, window)
    by_default = [
        "sliding_attention" if uses_window and not has_rope else "full_attention"
        for has_rope in rotated[:count]
    ]
    layers = [
        each if has_rope else replace(each, mixer=replace(each.mixer, rope=None))
        for each, has_rope in zip(read_layers_by_type(config, kinds, by_default), rotated, strict=False)
    ]
    return read_model(config, "smollm3", layers, positions, norm, tied=True)
