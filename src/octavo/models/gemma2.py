"""Gemma 2: norms before and after each block with gain 1 + w, softcaps, every other layer windowed,
embeddings scaled by sqrt(hidden size)."""

from __future__ import annotations

from dataclasses import replace

from octavo.models.config_reader import ConfigReader
from octavo.models.naming import FamilyNames
from octavo.models.rope import read_rope
from octavo.models.spec import Attention, DenseMLP, LayerNorms, LayerSpec, ModelSpec, Norm

NAMES = FamilyNames(
    huggingface_norms={
        "pre_mixer": "input_layernorm",
        "post_mixer": "post_attention_layernorm",
        "pre_ffn": "pre_feedforward_layernorm",
        "post_ffn": "post_feedforward_layernorm",
    },
    gguf_norms={
        "pre_mixer": "attn_norm",
        "post_mixer": "post_attention_norm",
        "pre_ffn": "ffn_norm",
        "post_ffn": "post_ffw_norm",
    },
    gguf_adds_norm_offset=True,
)
_ACTIVATION = "gelu_pytorch_tanh"


def build(config: ConfigReader) -> ModelSpec:
    hidden_size = config.integer("hidden_size")
    heads, kv_heads = config.heads()
    head_dim = config.head_dim(256)
    norm = Norm("rms", config.positive("rms_norm_eps", 1e-6), offset=1.0)
    bias = config.flag("attention_bias", False)
    # transformers computes with hidden_activation; hidden_act is a leftover of Gemma 1 that says "gelu".
    config.raw("hidden_act")
    if config.text("hidden_activation", _ACTIVATION) != _ACTIVATION:
        raise config.unsupported("hidden_activation", f"is not {_ACTIVATION}")
    if config.flag("use_bidirectional_attention", False):
        raise config.unsupported("use_bidirectional_attention", "makes it no causal model")
    full = LayerSpec(
        norms=LayerNorms(norm, norm, norm, norm),
        mixer=Attention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=config.positive("query_pre_attn_scalar", 256) ** -0.5,
            rope=read_rope(config, head_dim, default_base=10000.0),
            softcap=config.optional_positive("attn_logit_softcapping"),
            qkv_bias=bias,
            output_bias=bias,
        ),
        ffn=DenseMLP(config.integer("intermediate_size"), "gelu_tanh"),
    )
    windowed = replace(full, mixer=replace(full.mixer, window=config.integer("sliding_window", 4096)))
    kinds = {"full_attention": full, "sliding_attention": windowed}
    count = config.integer("num_hidden_layers", most=1024)
    types = config.raw("layer_types", [("sliding_attention", "full_attention")[i % 2] for i in range(count)])
    if not isinstance(types, list) or len(types) != count or any(kind not in list(kinds) for kind in types):
        raise config.unsupported("layer_types", f"does not name {count} layers of {sorted(kinds)}")
    return ModelSpec(
        family="gemma2",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        layers=tuple(kinds[kind] for kind in types),
        final_norm=norm,
        max_context_tokens=config.integer("max_position_embeddings", 8192),
        tied_head=config.flag("tie_word_embeddings", True),
        embedding_multiplier=hidden_size**0.5,
        final_softcap=config.optional_positive("final_logit_softcapping"),
    )
