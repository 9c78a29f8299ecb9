"""Llama 2 and 3.x, SmolLM2 and others that say model_type "llama": pre-norm, silu MLP, one rope."""

from __future__ import annotations

from octavo.models.config_reader import ConfigReader
from octavo.models.naming import FamilyNames
from octavo.models.rope import read_rope
from octavo.models.spec import Attention, DenseMLP, LayerNorms, LayerSpec, ModelSpec, Norm

NAMES = FamilyNames(
    huggingface_norms={"pre_mixer": "input_layernorm", "pre_ffn": "post_attention_layernorm"},
    gguf_norms={"pre_mixer": "attn_norm", "pre_ffn": "ffn_norm"},
    gguf_permutes_qk=True,
)


def build(config: ConfigReader) -> ModelSpec:
    hidden_size = config.integer("hidden_size")
    heads, kv_heads = config.heads()
    head_dim = config.head_dim(hidden_size // heads)
    norm = Norm("rms", config.positive("rms_norm_eps", 1e-6))
    bias = config.flag("attention_bias", False)
    if config.text("hidden_act", "silu") != "silu":
        raise config.unsupported("hidden_act", "is not silu")
    layer = LayerSpec(
        norms=LayerNorms(pre_mixer=norm, post_mixer=None, pre_ffn=norm, post_ffn=None),
        mixer=Attention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=read_rope(config, head_dim, default_base=10000.0),
            qkv_bias=bias,
            output_bias=bias,
        ),
        ffn=DenseMLP(config.integer("intermediate_size"), "silu", bias=config.flag("mlp_bias", False)),
    )
    return ModelSpec(
        family="llama",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        layers=(layer,) * config.integer("num_hidden_layers", most=1024),
        final_norm=norm,
        max_context_tokens=config.integer("max_position_embeddings", 2048),
        tied_head=config.flag("tie_word_embeddings", False),
    )
