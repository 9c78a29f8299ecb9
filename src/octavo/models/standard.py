"""What most decoders share: Llama's layer and model, read from the usual keys of a config.

A family takes these and replaces what differs, with `dataclasses.replace` on the frozen spec.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from octavo.models.config_reader import MAX_EXPERTS, ConfigReader
from octavo.models.rope import Positions
from octavo.models.spec import Attention, DenseMLP, LayerNorms, LayerSpec, ModelSpec, MoE, Norm


def read_rms_norm(config: ConfigReader, eps: float = 1e-6, offset: float = 0.0) -> Norm:
    return Norm("rms", config.positive("rms_norm_eps", eps), offset=offset)


def read_attention(
    config: ConfigReader,
    positions: Positions,
    *,
    heads: tuple[int, int] | None = None,
    head_dim: int | None = None,
) -> Attention:
    """Rotary grouped-query attention scaled by 1 / sqrt(head_dim), without biases.

    `heads` are (query heads, kv heads) and `head_dim` is what the family takes where the config is silent.
    """
    query_heads, kv_heads = config.heads(*(heads or ()))
    head_dim = config.head_dim(head_dim or config.integer("hidden_size") // query_heads)
    return Attention(query_heads, kv_heads, head_dim, head_dim**-0.5, positions.rope(head_dim))


def read_layer(
    config: ConfigReader, positions: Positions, norm: Norm, *, head_dim: int | None = None
) -> LayerSpec:
    """Llama's layer: a norm before each block, attention, and a gated MLP; no biases."""
    return LayerSpec(
        norms=LayerNorms(pre_mixer=norm, post_mixer=None, pre_ffn=norm, post_ffn=None),
        mixer=read_attention(config, positions, head_dim=head_dim),
        ffn=DenseMLP(config.integer("intermediate_size"), config.activation()),
    )


def read_model(
    config: ConfigReader,
    family: str,
    layers: Sequence[LayerSpec],
    positions: Positions,
    norm: Norm,
    *,
    tied: bool = False,
    vocab_size: int | None = None,
) -> ModelSpec:
    """`tied` (whether the head is the token table) and `vocab_size` are what the family takes where the config
    is silent."""
    return ModelSpec(
        family=family,
        vocab_size=config.integer("vocab_size", vocab_size),
        hidden_size=config.integer("hidden_size"),
        layers=tuple(layers),
        final_norm=norm,
        max_context_tokens=positions.max_context_tokens,
        tied_head=config.flag("tie_word_embeddings", tied),
    )


def read_text_part(
    config: ConfigReader, of_images: Sequence[str], build: Callable[[ConfigReader], ModelSpec]
) -> ModelSpec:
    """The model under `text_config` of a checkpoint that also sees; `of_images` are the keys of what is left unread."""
    for key in ("vision_config", *of_images):
        config.raw(key)
    text = config.nested("text_config")
    spec = build(text)
    text.finish()
    return replace(spec, tied_head=config.flag("tie_word_embeddings", spec.tied_head))


def read_experts(
    config: ConfigReader, *, hidden_size: int, experts: int, taken: int, normalized: bool
) -> MoE:
    """A mixture of experts; `experts`, of which each token takes `taken`, are the family's defaults."""
    key = "num_local_experts" if config.has("num_local_experts") else "num_experts"
    count = config.integer(key, experts, most=MAX_EXPERTS)
    return MoE(
        experts=count,
        experts_per_token=config.integer("num_experts_per_tok", taken, most=count),
        hidden_size=hidden_size,
        activation=config.activation(),
        normalized=normalized,
    )


def with_biases(layer: LayerSpec, attention: bool = False, mlp: bool = False) -> LayerSpec:
    """The layer with a bias on all four projections of its attention, and on all of its MLP."""
    assert isinstance(layer.ffn, DenseMLP)
    return replace(
        layer,
        mixer=replace(layer.mixer, qkv_bias=attention, output_bias=attention),
        ffn=replace(layer.ffn, bias=mlp),
    )


def with_window(layer: LayerSpec, window: int | None) -> LayerSpec:
    return replace(layer, mixer=replace(layer.mixer, window=window))


def each_full(every: int, count: int) -> list[str]:
    """Types of `count` layers: each `every`th is full, those between are windowed."""
    return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(count)]


def read_layers_by_type(
    config: ConfigReader, kinds: Mapping[str, LayerSpec], default: Sequence[str]
) -> list[LayerSpec]:
    """One layer for each entry of `layer_types`, by default `default`."""
    types = config.raw("layer_types", list(default))
    if not isinstance(types, list) or len(types) != len(default):
        raise config.unsupported("layer_types", f"does not name the type of each of {len(default)} layers")
    if any(kind not in list(kinds) for kind in types):
        raise config.unsupported("layer_types", f"names others than {', '.join(kinds)}")
    return [kinds[kind] for kind in types]


def read_windowed_layers(
    config: ConfigReader, full: LayerSpec, windowed: LayerSpec, default: Sequence[str]
) -> list[LayerSpec]:
    """Layers by `layer_types`; `windowed` gets the window of `sliding_window`, 4096 where the config is silent.

    Raises UnsupportedConfigError where it says null and a layer needs one: transformers computes no such model.
    """
    window = config.optional_integer("sliding_window", 4096)
    kinds = {"full_attention": full, "sliding_attention": with_window(windowed, window)}
    layers = read_layers_by_type(config, kinds, default)
    if window is None and "sliding_attention" in config.raw("layer_types", default):
        raise config.unsupported("sliding_window", "gives no window to layers of sliding attention")
    return layers
