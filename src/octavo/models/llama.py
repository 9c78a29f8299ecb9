"""Llama 2 and 3.x, SmolLM2 and others that say model_type "llama": pre-norm, silu MLP, one rope."""

from __future__ import annotations

from octavo.models.config_reader import ConfigReader
from octavo.models.naming import PRE_NORMS, FamilyNames
from octavo.models.rope import read_positions
from octavo.models.spec import ModelSpec
from octavo.models.standard import read_layer, read_model, read_rms_norm, with_biases

NAMES = FamilyNames(*PRE_NORMS, gguf_permutes_qk=True)


def build(config: ConfigReader) -> ModelSpec:
    # Falcon 3 says it so beside hidden_act.
    if config.text("activation", "swiglu") != "swiglu":
        raise config.unsupported("activation", "is not swiglu")
    positions, norm = read_positions(config), read_rms_norm(config)
    layer = with_biases(
        read_layer(config, positions, norm),
        attention=config.flag("attention_bias", False),
        mlp=config.flag("mlp_bias", False),
    )
    return read_model(config, "llama", [layer] * config.layer_count(), positions, norm)
