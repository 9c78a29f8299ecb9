"""The decoder in plain torch, one sequence's chunk at a time: the oracle every other runner is held to.

Weights are dequantized once into the compute dtype; norms, rope, softmax and the residual stream are fp32.
What it computes is `ModelSpec`, line by line. Shape letters: T tokens, H query heads, KH kv heads, G = H / KH,
D head dim, S keys seen, N output rows, K input columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from octavo.models.spec import Activation, Attention, FeedForward, LayerSpec, ModelSpec, MoE, Norm, Rope
from octavo.runners.reference.feed_forward import (
    DenseFeedForward,
    FeedForwardBlock,
    Linear,
    SparseFeedForward,
)
from octavo.runners.reference.kv_cache import KVCache, Span
from octavo.runners.reference.limits import SCORES_BLOCK_BYTES


class WeightReader(Protocol):
    """What the model needs of a WeightStore."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def unpack(self, name: str) -> np.ndarray:
        """The parameter's float32 values, of its shape."""

    def release(self, name: str) -> None:
        """Its packed form is not needed any more."""


@dataclass(frozen=True, slots=True)
class Normalizer:
    norm: Norm
    gain: torch.Tensor  # offset + w, fp32
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        width = self.gain.shape
        if self.norm.kind == "layernorm":
            return F.layer_norm(x, width, self.gain, self.bias, self.norm.eps)
        y = F.rms_norm(x, width, self.gain, self.norm.eps)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True, slots=True)
class Layer:
    spec: LayerSpec
    qkv: Linear
    o: Linear
    ffn: FeedForwardBlock
    norms: dict[str, Normalizer | None]


class ReferenceModel:
    """Weights and the forward pass. The KV cache is passed in; nothing here knows of slots or sampling."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: WeightReader,
        context_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.spec = spec
        self._dtype = dtype
        self._device = device
        self._weights = weights
        self.addends: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        """Of the adapter that `forward` and `logits` apply: empty, none."""
        self.embedding = self._matrix(["embedding.weight"])
        self.layers = tuple(self._layer(f"layers.{i}.", layer) for i, layer in enumerate(spec.layers))
        self.final_norm = self._norm("final_norm", spec.final_norm)
        head = self.embedding if spec.tied_head else self._matrix(["head.weight"])
        head_bias = self._vector("head.bias") if spec.head_bias else None
        self.head = Linear(head, head_bias, (("head.weight", spec.vocab_size),), self.addends)
        ropes = {layer.mixer.rope for layer in spec.layers if layer.mixer.rope is not None}
        self._rotations = {rope: _rotation(rope, context_tokens, device) for rope in ropes}
        del self._weights  # all is read: do not keep the store alive

    @property
    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor held, once."""
        linears = [
            self.head,
            *(x for layer in self.layers for x in (layer.qkv, layer.o, *layer.ffn.linears)),
        ]
        norms = [self.final_norm, *(n for layer in self.layers for n in layer.norms.values() if n)]
        if not self.spec.tied_head:
            yield self.embedding
        for linear in linears:
            yield linear.weight
            if linear.bias is not None:
                yield linear.bias
        for norm in norms:
            yield norm.gain
            if norm.bias is not None:
                yield norm.bias
        for cos, sin in self._rotations.values():
            yield from (cos, sin)

    def forward(
        self,
        token_ids: torch.Tensor,
        start: int,
        spans: tuple[Span, ...],
        cache: KVCache,
        each_layer: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """int64 [T] at positions start.. -> hidden states fp32 [T, hidden], before the final norm.

        `each_layer` is given them after each layer.
        """
        x = self.embedding[token_ids].float() * self.spec.embedding_multiplier
        span_of = {
            layer: span
            for group, span in zip(self.spec.kv_groups, spans, strict=True)
            for layer in group.layers
        }
        for index, layer in enumerate(self.layers):
            scale = layer.spec.residual_multiplier
            normed = _apply(layer.norms["pre_mixer"], x)
            mixed = self._attend(index, layer, normed, start, span_of[index], cache)
            mixed = _apply(layer.norms["post_mixer"], mixed) * scale
            if layer.spec.parallel:
                norm = layer.norms["pre_ffn"]
                fed = normed if norm is None else norm(x)
                x = x + mixed
            else:
                x = x + mixed
                fed = _apply(layer.norms["pre_ffn"], x)
            x = x + _apply(layer.norms["post_ffn"], layer.ffn(fed)) * scale
            if each_layer is not None:
                each_layer(x)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states fp32 [T, hidden] -> logits fp32 [T, V]."""
        y = self.head(self.final_norm(hidden)) * self.spec.logits_multiplier
        cap = self.spec.final_softcap
        return y if cap is None else torch.tanh(y / cap) * cap

    def _attend(
        self, index: int, layer: Layer, x: torch.Tensor, start: int, span: Span, cache: KVCache
    ) -> torch.Tensor:
        mixer, tokens = layer.spec.mixer, x.shape[0]
        heads, kv_heads, dim = mixer.heads, mixer.kv_heads, mixer.head_dim
        q, k, v = torch.split(layer.qkv(x), [heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
        if mixer.qk_norm is not None:
            q, k = self._normalize_qk(layer, q, k)
        q, k, v = (t.reshape(tokens, -1, dim) for t in (q, k, v))
        if mixer.rope is not None:
            cos, sin = (table[start : start + tokens, None] for table in self._rotations[mixer.rope])
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        cache.write(index, span.write, k, v)
        keys, values = cache.read(index, span.read)
        out = _attention(mixer, q, keys, values, start, span.first)
        return layer.o(out.reshape(tokens, heads * dim))

    def _normalize_qk(
        self, layer: Layer, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q_norm, k_norm = layer.norms["q_norm"], layer.norms["k_norm"]
        if layer.spec.mixer.qk_norm_scope == "full":
            return _apply(q_norm, q), _apply(k_norm, k)
        heads = (len(q), -1, layer.spec.mixer.head_dim)
        return _apply(q_norm, q.reshape(heads)), _apply(k_norm, k.reshape(heads))

    def _layer(self, prefix: str, spec: LayerSpec) -> Layer:
        mixer = spec.mixer
        norms = {
            name: self._norm(f"{prefix}norms.{name}", getattr(spec.norms, name))
            for name in ("pre_mixer", "post_mixer", "pre_ffn", "post_ffn")
            if getattr(spec.norms, name) is not None
        }
        if mixer.qk_norm is not None:
            norms |= {n: self._norm(f"{prefix}mixer.{n}", mixer.qk_norm) for n in ("q_norm", "k_norm")}
        return Layer(
            spec=spec,
            qkv=self._linear(prefix, ["mixer.q", "mixer.k", "mixer.v"], mixer.qkv_bias),
            o=self._linear(prefix, ["mixer.o"], mixer.output_bias),
            ffn=self._feed_forward(prefix, spec.ffn),
            norms={**dict.fromkeys(("pre_mixer", "post_mixer", "pre_ffn", "post_ffn")), **norms},
        )

    def _feed_forward(self, prefix: str, ffn: FeedForward) -> FeedForwardBlock:
        if isinstance(ffn, MoE):
            router = Linear(self._matrix([f"{prefix}ffn.router.weight"], torch.float32), None, (), {})
            experts = (f"{prefix}ffn.experts.{i}." for i in range(ffn.experts))
            made = tuple(self._mlp(expert, ffn.activation, gated=True, bias=False) for expert in experts)
            return SparseFeedForward(ffn, router, made)
        return self._mlp(f"{prefix}ffn.", ffn.activation, ffn.gated, ffn.bias)

    def _mlp(self, prefix: str, activation: Activation, gated: bool, bias: bool) -> DenseFeedForward:
        gate_up = self._linear(prefix, ["gate", "up"] if gated else ["up"], bias)
        return DenseFeedForward(activation, gated, gate_up, self._linear(prefix, ["down"], bias))

    def _linear(self, prefix: str, names: list[str], bias: bool) -> Linear:
        weights = [f"{prefix}{name}.weight" for name in names]
        parts = tuple((name, self._weights.shape(name)[0]) for name in weights)
        weight = self._matrix(weights)
        biases = [self._vector(f"{prefix}{name}.bias") for name in names] if bias else None
        return Linear(weight, None if biases is None else torch.cat(biases), parts, self.addends)

    def _matrix(self, names: list[str], dtype: torch.dtype | None = None) -> torch.Tensor:
        """The named matrices, one under the other, by default in the compute dtype; one is read at a time."""
        shapes = [self._weights.shape(name) for name in names]
        rows = [shape[0] for shape in shapes]
        matrix = torch.empty((sum(rows), shapes[0][1]), dtype=dtype or self._dtype, device=self._device)
        for name, part in zip(names, torch.split(matrix, rows), strict=True):
            part.copy_(torch.from_numpy(self._weights.unpack(name)))
            self._weights.release(name)
        return matrix

    def _vector(self, name: str) -> torch.Tensor:
        vector = torch.tensor(self._weights.unpack(name), device=self._device)
        self._weights.release(name)
        return vector

    def _norm(self, name: str, norm: Norm) -> Normalizer:
        gain = self._vector(f"{name}.weight") + norm.offset
        return Normalizer(norm, gain, self._vector(f"{name}.bias") if norm.bias else None)


def _apply(norm: Normalizer | None, x: torch.Tensor) -> torch.Tensor:
    return x if norm is None else norm(x)


def _rotation(rope: Rope, context_tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin fp32 [context, rotary_dim / 2]."""
    frequencies = torch.tensor(rope.inverse_frequencies, dtype=torch.float32)
    angles = torch.arange(context_tokens, dtype=torch.float32)[:, None] * frequencies
    factor = rope.attention_factor
    return (angles.cos() * factor).to(device), (angles.sin() * factor).to(device)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pairs (i, i + rotary_dim / 2) of [T, heads, D] by [T, 1, rotary_dim / 2] angles."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _attention(
    mixer: Attention, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, first: int
) -> torch.Tensor:
    """q [T, H, D] at positions start.., keys and values [KH, S, D] at positions first.. -> [T, H, D]."""
    tokens, heads, dim = q.shape
    kv_heads, seen = keys.shape[:2]
    keys, values = keys.float(), values.float()
    block = max(1, SCORES_BLOCK_BYTES // (4 * heads * seen))
    out = torch.empty_like(q)
    for begin in range(0, tokens, block):
        part = q[begin : begin + block]
        rows = part.shape[0]
        grouped = part.view(rows, kv_heads, -1, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)
        scores = torch.bmm(grouped, keys.transpose(1, 2)).mul_(mixer.scale)  # [KH, G T, S]
        if mixer.softcap is not None:
            scores = scores.div_(mixer.softcap).tanh_().mul_(mixer.softcap)
        if tokens > 1 or mixer.window is not None:
            at = torch.arange(start + begin, start + begin + rows, device=q.device)[:, None]
            key = torch.arange(first, first + seen, device=q.device)
            hidden = key > at
            if mixer.window is not None:
                hidden |= key <= at - mixer.window
            scores.view(kv_heads, -1, rows, seen).masked_fill_(hidden, -torch.inf)
        mixed = torch.bmm(scores.softmax(dim=-1), values)  # [KH, G T, D]
        out[begin : begin + rows] = (
            mixed.view(kv_heads, -1, rows, dim).permute(2, 0, 1, 3).reshape(rows, heads, dim)
        )
    return out
