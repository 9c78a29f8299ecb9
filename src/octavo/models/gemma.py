"""Gemma 1: Llama with norms of gain 1 + w, a tanh GELU, and embeddings scaled by sqrt(hidden size)."""

from __future__ import annotations

from dataclasses import replace

from octavo.models.config_reader import ConfigReader
from octavo.models.naming import PRE_NORMS, FamilyNames
from octavo.models.rope import read_positions
from octavo.models.spec import DenseMLP, LayerNorms, LayerSpec, ModelSpec
from octavo.models.standard import read_attention, read_model, read_rms_norm, with_biases

NAMES = FamilyNames(*PRE_NORMS, gguf_adds_norm_offset=True)


def build(config: ConfigReader) -> ModelSpec:
    positions, norm = read_positions(config, max_position=8192), read_rms_norm(config, offset=1.0)
    for key in ("hidden_act", "hidden_activation"):
        # The first configs say "gelu", and mean the other.
        if config.text(key, "gelu") not in ("gelu", "gelu_pytorch_tanh"):
            raise config.unsupported(key, "is not gelu_pytorch_tanh")
    if config.flag("use_bidirectional_attention", False):
        raise config.unsupported("use_bidirectional_attention", "makes it no causal model")
    layer = LayerSpec(
        norms=LayerNorms(norm, None, norm, None),
        mixer=read_attention(config, positions, head_dim=256),
        ffn=DenseMLP(config.integer("intermediate_size"), "gelu_tanh"),
    )
    layer = with_biases(layer, attention=config.flag("attention_bias", False))
    model = read_model(config, "gemma", [layer] * config.layer_count(), positions, norm, tied=True)
    return replace(model, embedding_multiplier=model.hidden_size**0.5)
