"""Gemma 3: Gemma 2 with a norm over each head of q and k and without softcaps; five windowed layers to a full
one, each kind with a rope of its own."""

from __future__ import annotations

from dataclasses import replace

from octavo.models.config_reader import ConfigReader
from octavo.models.gemma2 import NAMES, read_gemma_layer
from octavo.models.rope import read_positions_by_type
from octavo.models.spec import ModelSpec
from octavo.models.standard import each_full, read_model, read_rms_norm, read_windowed_layers

__all__ = ["NAMES", "build"]

_BASES = {
    "full_attention": ("rope_theta", 1_000_000.0),
    "sliding_attention": ("rope_local_base_freq", 10_000.0),
}


def build(config: ConfigReader) -> ModelSpec:
    positions = read_positions_by_type(config, bases=_BASES, max_position=131_072)
    norm = read_rms_norm(config, offset=1.0)
    kinds = {}
    for kind in _BASES:
        # The vision checkpoints' text_config leaves out what is its class's default.
        layer = read_gemma_layer(config, positions[kind], heads=(8, 4))
        kinds[kind] = replace(layer, mixer=replace(layer.mixer, qk_norm=norm))
    every = config.integer("sliding_window_pattern", 6)
    layers = read_windowed_layers(
        config,
        kinds["full_attention"],
        kinds["sliding_attention"],
        each_full(every, config.layer_count(26)),
    )
    model = read_model(
        config, "gemma3_text", layers, positions["full_attention"], norm, tied=True, vocab_size=262_208
    )
    return replace(
        model,
        embedding_multiplier=model.hidden_size**0.5,
        final_softcap=config.optional_positive("final_logit_softcapping"),
    )
