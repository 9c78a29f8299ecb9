"""From a `ModelSpec` to its `Parameter`s: where each tensor stands in a checkpoint of either naming.

What families share is here; a family adds only what its norms are called and how GGUF stores them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from octavo.models.parameters import Parameter
from octavo.models.spec import LayerSpec, ModelSpec, Norm
from octavo.types import TensorNaming


@dataclass(frozen=True, slots=True)
class FamilyNames:
    """What a family calls things. Norm names are keyed by their field in `LayerNorms`."""

    huggingface_norms: Mapping[str, str]
    gguf_norms: Mapping[str, str]
    gguf_permutes_qk: bool = False
    """llama.cpp's converter stores q and k with rotary pairs adjacent for these families."""
    gguf_adds_norm_offset: bool = False
    """llama.cpp's converter adds the norm's offset (Gemma's 1 + w) into the stored weight."""


_HUGGINGFACE = {
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "layer": "model.layers.{}.",
    "mixer.q": "self_attn.q_proj",
    "mixer.k": "self_attn.k_proj",
    "mixer.v": "self_attn.v_proj",
    "mixer.o": "self_attn.o_proj",
    "mixer.q_norm": "self_attn.q_norm",
    "mixer.k_norm": "self_attn.k_norm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}
_GGUF = {
    "embedding": "token_embd",
    "final_norm": "output_norm",
    "head": "output",
    "layer": "blk.{}.",
    "mixer.q": "attn_q",
    "mixer.k": "attn_k",
    "mixer.v": "attn_v",
    "mixer.o": "attn_output",
    "mixer.q_norm": "attn_q_norm",
    "mixer.k_norm": "attn_k_norm",
    "ffn.gate": "ffn_gate",
    "ffn.up": "ffn_up",
    "ffn.down": "ffn_down",
}


def parameters(spec: ModelSpec, names: FamilyNames, naming: TensorNaming) -> tuple[Parameter, ...]:
    """All parameters of the model, embedding first, then layer by layer, head last."""
    return tuple(_Lister(spec, names, naming).all())


class _Lister:
    def __init__(self, spec: ModelSpec, names: FamilyNames, naming: TensorNaming) -> None:
        self.spec = spec
        self.gguf = naming == "gguf"
        self.names = _GGUF if self.gguf else _HUGGINGFACE
        self.norms = names.gguf_norms if self.gguf else names.huggingface_norms
        self.permutes_qk = self.gguf and names.gguf_permutes_qk
        self.adds_offset = self.gguf and names.gguf_adds_norm_offset

    def all(self) -> Iterator[Parameter]:
        spec = self.spec
        table = (spec.vocab_size, spec.hidden_size)
        yield Parameter("embedding.weight", table, "embedding", self.names["embedding"] + ".weight")
        for index, layer in enumerate(spec.layers):
            yield from self.layer(layer, f"layers.{index}.", self.names["layer"].format(index))
        yield from self.norm(spec.final_norm, spec.hidden_size, "final_norm", self.names["final_norm"])
        if not spec.tied_head:
            yield Parameter("head.weight", table, "matrix", self.names["head"] + ".weight")
        if spec.head_bias:
            yield Parameter("head.bias", table[:1], "vector", self.names["head"] + ".bias")

    def layer(self, layer: LayerSpec, ours: str, theirs: str) -> Iterator[Parameter]:
        hidden, mixer, ffn = self.spec.hidden_size, layer.mixer, layer.ffn
        q, kv = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
        yield from self.norm(layer.norms.pre_mixer, hidden, ours + "norms.pre_mixer", theirs)
        heads = (mixer.heads, mixer.kv_heads) if self.permutes_qk else (None, None)
        yield from self.linear(ours, theirs, "mixer.q", (q, hidden), mixer.qkv_bias, heads[0])
        yield from self.linear(ours, theirs, "mixer.k", (kv, hidden), mixer.qkv_bias, heads[1])
        yield from self.linear(ours, theirs, "mixer.v", (kv, hidden), mixer.qkv_bias)
        if mixer.qk_norm is not None:
            full = mixer.qk_norm_scope == "full"
            for name, width in (("mixer.q_norm", q), ("mixer.k_norm", kv)):
                source = theirs + self.names[name]
                yield from self.norm(mixer.qk_norm, width if full else mixer.head_dim, ours + name, source)
        yield from self.linear(ours, theirs, "mixer.o", (hidden, q), mixer.output_bias)
        yield from self.norm(layer.norms.post_mixer, hidden, ours + "norms.post_mixer", theirs)
        yield from self.norm(layer.norms.pre_ffn, hidden, ours + "norms.pre_ffn", theirs)
        if ffn.gated:
            yield from self.linear(ours, theirs, "ffn.gate", (ffn.hidden_size, hidden), ffn.bias)
        yield from self.linear(ours, theirs, "ffn.up", (ffn.hidden_size, hidden), ffn.bias)
        yield from self.linear(ours, theirs, "ffn.down", (hidden, ffn.hidden_size), ffn.bias)
        yield from self.norm(layer.norms.post_ffn, hidden, ours + "norms.post_ffn", theirs)

    def linear(
        self, ours: str, theirs: str, name: str, shape: tuple[int, int], bias: bool, heads: int | None = None
    ) -> Iterator[Parameter]:
        source = theirs + self.names[name]
        yield Parameter(f"{ours}{name}.weight", shape, "matrix", f"{source}.weight", unpermute_heads=heads)
        if bias:
            yield Parameter(
                f"{ours}{name}.bias", shape[:1], "vector", f"{source}.bias", unpermute_heads=heads
            )

    def norm(self, norm: Norm | None, width: int, ours: str, theirs: str) -> Iterator[Parameter]:
        """`theirs` is the full source name, or the layer's prefix for one of the four layer norms."""
        if norm is None:
            return
        source = theirs + self.norms[ours.rpartition(".")[2]] if theirs.endswith(".") else theirs
        add = -norm.offset if self.adds_offset else 0.0
        yield Parameter(f"{ours}.weight", (width,), "vector", f"{source}.weight", add=add)
        if norm.bias:
            yield Parameter(f"{ours}.bias", (width,), "vector", f"{source}.bias")
