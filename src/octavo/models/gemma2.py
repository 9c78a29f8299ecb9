"""Gemma 2: norms before and after each block with gain 1 + w, softcaps, every other layer windowed,
embeddings scaled by sqrt(hidden size)."""

from __future__ import annotations

from dataclasses import replace

from octavo.models.config_reader import ConfigReader
from octavo.models.naming import PRE_AND_POST_NORMS, FamilyNames
from octavo.models.rope import Positions, read_positions
from octavo.models.spec import DenseMLP, LayerNorms, LayerSpec, ModelSpec
from octavo.models.standard import (
    each_full,
    read_attention,
    read_model,
    read_rms_norm,
    read_windowed_layers,
    with_biases,
)

NAMES = FamilyNames(*PRE_AND_POST_NORMS, gguf_adds_norm_offset=True)


def build(config: ConfigReader) -> ModelSpec:
    positions, norm = read_positions(config, max_position=8192), read_rms_norm(config, offset=1.0)
    # transformers computes with hidden_activation; hidden_act is a leftover of Gemma 1 that says "gelu".
    config.raw("hidden_act")
    full = read_gemma_layer(config, positions)
    softcap = config.optional_positive("attn_logit_softcapping", 50.0)
    full = replace(full, mixer=replace(full.mixer, softcap=softcap))
    layers = read_windowed_layers(config, full, full, each_full(2, config.layer_count()))
    model = read_model(config, "gemma2", layers, positions, norm, tied=True)
    return replace(
        model,
        embedding_multiplier=model.hidden_size**0.5,
        final_softcap=config.optional_positive("final_logit_softcapping", 30.0),
    )


def read_gemma_layer(
    config: ConfigReader, positions: Positions, *, heads: tuple[int, int] | None = None
) -> LayerSpec:
    """A layer of full attention; `heads` are the family's (query heads, kv heads) by default."""
    if config.text("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise config.unsupported("hidden_activation", "is not gelu_pytorch_tanh")
    if config.flag("use_bidirectional_attention", False):
        raise config.unsupported("use_bidirectional_attention", "makes it no causal model")
    norm = read_rms_norm(config, offset=1.0)
    layer = LayerSpec(
        norms=LayerNorms(norm, norm, norm, norm),
        mixer=replace(
            read_attention(config, positions, heads=heads, head_dim=256),
            scale=config.positive("query_pre_attn_scalar", 256) ** -0.5,
        ),
        ffn=DenseMLP(config.integer("intermediate_size"), "gelu_tanh"),
    )
    return with_biases(layer, attention=config.flag("attention_bias", False))
