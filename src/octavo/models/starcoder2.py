"""StarCoder2: layer norms with a bias, biases on every projection, an MLP without a gate, a window over all layers."""

from __future__ import annotations

from octavo.models.config_reader import ConfigReader
from octavo.models.naming import PRE_NORMS, FamilyNames
from octavo.models.rope import read_positions
from octavo.models.spec import DenseMLP, LayerNorms, LayerSpec, ModelSpec, Norm
from octavo.models.standard import read_attention, read_model, with_biases, with_window

NAMES = FamilyNames(*PRE_NORMS, huggingface={"ffn.up": "mlp.c_fc", "ffn.down": "mlp.c_proj"})

_UNREAD = {
    "norm_type": "layer_norm",
    "mlp_type": "default",
    "activation_function": "gelu",
    "attention_softmax_in_fp32": True,
    "scale_attention_softmax_in_fp32": True,
}
"""Keys of the published configs that transformers does not read, with the only value that each has there."""


def build(config: ConfigReader) -> ModelSpec:
    positions = read_positions(config, max_position=4096)
    norm = Norm("layernorm", config.positive("norm_epsilon", 1e-5), bias=True)
    # The published configs say it twice.
    if config.positive("layer_norm_epsilon", norm.eps) != norm.eps:
        raise config.unsupported("layer_norm_epsilon", "differs from norm_epsilon")
    for key, value in _UNREAD.items():
        if config.raw(key, value) != value:
            raise config.unsupported(key, f"is not {value!r}, the only value known to be computed")
    mixer = read_attention(config, positions, heads=(24, 2))
    width = config.integer("intermediate_size", 12288)
    layer = LayerSpec(
        norms=LayerNorms(pre_mixer=norm, post_mixer=None, pre_ffn=norm, post_ffn=None),
        mixer=mixer,
        ffn=DenseMLP(width, config.activation(default="gelu_pytorch_tanh"), gated=False),
    )
    biases = config.flag("use_bias", True)
    layer = with_biases(layer, attention=biases, mlp=biases)
    layer = with_window(layer, config.optional_integer("sliding_window"))
    return read_model(config, "starcoder2", [layer] * config.layer_count(30), positions, norm, tied=True)
