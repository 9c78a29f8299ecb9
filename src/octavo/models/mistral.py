"""Mistral: Llama with a window over all layers."""

from __future__ import annotations

from octavo.models.config_reader import ConfigReader
from octavo.models.llama import NAMES
from octavo.models.rope import read_positions
from octavo.models.spec import ModelSpec
from octavo.models.standard import read_layer, read_model, read_rms_norm, with_window

__all__ = ["NAMES", "build"]


def build(config: ConfigReader) -> ModelSpec:
    positions, norm = read_positions(config, max_position=4096 * 32), read_rms_norm(config)
    # A config that leaves the key out means 4096; one that says null means no window.
    layer = with_window(read_layer(config, positions, norm), config.optional_integer("sliding_window", 4096))
    return read_model(config, "mistral", [layer] * config.layer_count(), positions, norm)
