"""OLMo 3: OLMo 2 with three windowed layers to a full one, whose rope alone is scaled."""

from __future__ import annotations

from octavo.models.config_reader import ConfigReader
from octavo.models.olmo2 import NAMES, read_olmo_layer
from octavo.models.rope import read_positions_by_type
from octavo.models.spec import ModelSpec
from octavo.models.standard import each_full, read_model, read_rms_norm, read_windowed_layers

__all__ = ["NAMES", "build"]

# transformers gives windowed layers the default base even where an old config's rope_theta is another.
_BASES = {"full_attention": ("rope_theta", 500_000.0), "sliding_attention": (None, 500_000.0)}


def build(config: ConfigReader) -> ModelSpec:
    positions = read_positions_by_type(config, bases=_BASES, max_position=2048)
    layers = read_windowed_layers(
        config,
        read_olmo_layer(config, positions["full_attention"]),
        read_olmo_layer(config, positions["sliding_attention"]),
        each_full(4, config.layer_count()),
    )
    full = positions["full_attention"]
    return read_model(config, "olmo3", layers, full, read_rms_norm(config, 1e-5))
