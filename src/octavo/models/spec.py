"""What a decoder computes, as plain data: every runner reads this and nothing else of a config.

Tagged frozen classes; a runner lists the classes and values it accepts. Shape letters: H query heads,
KH kv heads, D head dim. Parameter names (see `octavo.models.parameters`) hang off this structure:
`embedding.weight`, `layers.{i}.mixer.q.weight`, `layers.{i}.ffn.gate.weight`, `final_norm.weight`, ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

KV_PAGE_TOKENS = 32
"""Tokens a KV page holds, in every runner and group."""


@dataclass(frozen=True, slots=True)
class Norm:
    """y = normalize(x) * (offset + w) (+ b). rms: x / sqrt(mean(x^2) + eps); layernorm: also centred."""

    kind: Literal["rms", "layernorm"]
    eps: float
    offset: float = 0.0
    """1.0 for Gemma, whose weights are stored as w with a gain of 1 + w."""
    bias: bool = False


Activation = Literal["silu", "gelu", "gelu_tanh"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of one layer, fixed once from the config and the configured context.

    `inverse_frequencies` [rotary_dim / 2] and `attention_factor` (multiplies cos and sin) already contain
    the scaling; `kind`, `base` and the rest say where they came from. Pairs are (i, i + rotary_dim/2), as in
    Hugging Face's rotate_half.
    """

    kind: RopeKind
    base: float
    rotary_dim: int
    """Leading dims of each head that are rotated; the rest pass through (partial rotary)."""
    inverse_frequencies: tuple[float, ...]
    attention_factor: float = 1.0
    reason: str = ""
    """What a scaling that depends on the length was fixed for, in words; "" where it does not."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query softmax attention. Parameters: q, k, v, o (weight, bias), q_norm, k_norm."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    """Multiplies q.k before the softcap."""
    rope: Rope | None
    window: int | None = None
    """A query at p sees keys in (p - window, p]; None: all."""
    softcap: float | None = None
    """scores = softcap * tanh(scores / softcap)."""
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Norm | None = None
    qk_norm_scope: Literal["head", "full"] = "head"
    """head: over D of each head, before rope; full: over the whole projection."""


@dataclass(frozen=True, slots=True)
class DenseMLP:
    """down(act(gate(x)) * up(x)), or down(act(up(x))) where not gated. Parameters: gate, up, down."""

    hidden_size: int
    activation: Activation
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True, slots=True)
class MoE:
    """Sparse mixture of gated MLPs: each token goes through `experts_per_token` of `experts` and gets their
    outputs' sum, weighted by the router. Parameters: router, experts.{e}.gate, experts.{e}.up, experts.{e}.down.

    The router's weights are softmax(router(x)) in fp32 over all experts, of which the largest are taken.
    """

    experts: int
    experts_per_token: int
    hidden_size: int
    """Of each expert."""
    activation: Activation
    normalized: bool
    """Whether the weights of the taken experts are divided by their sum."""


Mixer = Attention
FeedForward = DenseMLP | MoE


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """Where norms stand. None: no norm there. A post norm is applied to the block's output, before the
    residual is added."""

    pre_mixer: Norm | None
    post_mixer: Norm | None
    pre_ffn: Norm | None
    post_ffn: Norm | None


@dataclass(frozen=True, slots=True)
class LayerSpec:
    norms: LayerNorms
    mixer: Mixer
    ffn: FeedForward
    parallel: bool = False
    """x + mixer(pre_mixer(x)) + ffn(pre_ffn(x)) instead of one after the other; pre_ffn None: the mixer's
    normalized input serves both."""
    residual_multiplier: float = 1.0
    """Multiplies each block's output before it joins the residual stream."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder: embedding -> layers -> final norm -> head.

    `max_context_tokens` is the length the config promises. `vocab_size` is the width of the logits,
    which may exceed the tokenizer's.
    """

    family: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    final_norm: Norm
    max_context_tokens: int
    tied_head: bool
    head_bias: bool = False
    embedding_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    final_softcap: float | None = None

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        """Layers that share a page table: full attention first, then each window size, ascending."""
        windows = {layer.mixer.window for layer in self.layers}
        return tuple(
            KVGroup(window, tuple(i for i, x in enumerate(self.layers) if x.mixer.window == window))
            for window in sorted(windows, key=lambda w: (w is not None, w or 0))
        )


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers whose KV is paged together. A window group needs only the pages its last window touches."""

    window: int | None
    layers: tuple[int, ...]
