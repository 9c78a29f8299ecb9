"""From a `ModelSpec` to its `Parameter`s: where each tensor stands in a checkpoint of either naming.

What families share is here; a family adds only what it calls otherwise and how GGUF stores it.
Shape letters: N output rows, K input columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from octavo.models.parameters import Parameter
from octavo.models.spec import Attention, FeedForward, LayerSpec, ModelSpec, MoE, Norm
from octavo.types import TensorNaming

PRE_NORMS: tuple[Mapping[str, str], Mapping[str, str]] = (
    {"pre_mixer": "input_layernorm", "pre_ffn": "post_attention_layernorm"},
    {"pre_mixer": "attn_norm", "pre_ffn": "ffn_norm"},
)
"""Norms of Llama and its kin, in Hugging Face's names and in GGUF's."""
PRE_AND_POST_NORMS: tuple[Mapping[str, str], Mapping[str, str]] = (
    {
        "pre_mixer": "input_layernorm",
        "post_mixer": "post_attention_layernorm",
        "pre_ffn": "pre_feedforward_layernorm",
        "post_ffn": "post_feedforward_layernorm",
    },
    {
        "pre_mixer": "attn_norm",
        "post_mixer": "post_attention_norm",
        "pre_ffn": "ffn_norm",
        "post_ffn": "post_ffw_norm",
    },
)
"""The same of Gemma 2, and of others with a norm after a block."""
TEXT_PART_ROOTS = (("language_model.model.", "language_model.lm_head"), ("model.language_model.", "lm_head"))
"""Of a language model within one that sees: as published, and as transformers 5 saves it."""


@dataclass(frozen=True, slots=True)
class FamilyNames:
    """What a family calls things. Norm names are keyed by their field in `LayerNorms`."""

    huggingface_norms: Mapping[str, str]
    gguf_norms: Mapping[str, str]
    gguf_permutes_qk: bool = False
    """llama.cpp's converter stores q and k with rotary pairs adjacent for these families."""
    gguf_adds_norm_offset: bool = False
    """llama.cpp's converter adds the norm's offset (Gemma's 1 + w) into the stored weight."""
    adjacent_rotary_pairs: bool = False
    """The family itself turns dims (2i, 2i + 1) of a head: q and k are put in order from any checkpoint."""
    huggingface: Mapping[str, str] = field(default_factory=dict)
    gguf: Mapping[str, str] = field(default_factory=dict)
    """Projections with other names than usual. Those of one name are rows of one tensor, in our order."""
    huggingface_roots: tuple[tuple[str, str], ...] = (("model.", "lm_head"),)
    """(prefix of everything but the head, name of the head), the likeliest first."""


_HUGGINGFACE = {
    "embedding": "embed_tokens",
    "final_norm": "norm",
    "layer": "layers.{}.",
    "mixer.q": "self_attn.q_proj",
    "mixer.k": "self_attn.k_proj",
    "mixer.v": "self_attn.v_proj",
    "mixer.o": "self_attn.o_proj",
    "mixer.q_norm": "self_attn.q_norm",
    "mixer.k_norm": "self_attn.k_norm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
    "ffn.router": "mlp.gate",
    "ffn.experts.gate": "mlp.experts.{}.gate_proj.weight",
    "ffn.experts.up": "mlp.experts.{}.up_proj.weight",
    "ffn.experts.down": "mlp.experts.{}.down_proj.weight",
}
_STACKED_EXPERTS = {
    "ffn.router": "mlp.gate",
    "ffn.experts.gate": "mlp.experts.gate_up_proj",
    "ffn.experts.up": "mlp.experts.gate_up_proj",
    "ffn.experts.down": "mlp.experts.down_proj",
}
"""What transformers 5 calls them in memory: one tensor [experts, N, K] for all. Checkpoints may have either."""
_GGUF_EXPERTS = {
    "ffn.experts.gate": "ffn_gate.{}.weight",
    "ffn.experts.up": "ffn_up.{}.weight",
    "ffn.experts.down": "ffn_down.{}.weight",
}
"""In the first Mixtral files: one tensor an expert."""
_GGUF = {
    "embedding": "token_embd",
    "final_norm": "output_norm",
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
    "ffn.router": "ffn_gate_inp",
    "ffn.experts.gate": "ffn_gate_exps.weight",
    "ffn.experts.up": "ffn_up_exps.weight",
    "ffn.experts.down": "ffn_down_exps.weight",
}


def parameters(
    spec: ModelSpec, names: FamilyNames, naming: TensorNaming, tensors: Container[str] = frozenset()
) -> tuple[Parameter, ...]:
    """All parameters of the model, embedding first, then layer by layer, head last.

    `tensors` are the names in the checkpoint, which decide where a family's checkpoints differ; without them
    the usual ones are meant.
    """
    return tuple(_Lister(spec, names, naming, tensors).all())


@dataclass(frozen=True, slots=True)
class _Projection:
    name: str
    rows: int
    heads: int | None = None
    """`Parameter.unpermute_heads`."""


class _Lister:
    def __init__(
        self, spec: ModelSpec, names: FamilyNames, naming: TensorNaming, tensors: Container[str]
    ) -> None:
        self.spec = spec
        self.tensors = tensors
        self.gguf = naming == "gguf"
        self.names = self.gguf_names(names.gguf) if self.gguf else {**_HUGGINGFACE, **names.huggingface}
        self.norms = names.gguf_norms if self.gguf else names.huggingface_norms
        self.permutes_qk = names.adjacent_rotary_pairs or (self.gguf and names.gguf_permutes_qk)
        self.adds_offset = self.gguf and names.gguf_adds_norm_offset
        self.root, self.head = ("", "output") if self.gguf else self.choose_root(names.huggingface_roots)

    def gguf_names(self, family: Mapping[str, str]) -> dict[str, str]:
        """Older files have apart what newer ones fuse: a projection that is there by its usual name is that one."""
        first = _GGUF["layer"].format(0)
        usual = {part for part in family if f"{first}{_GGUF[part]}.weight" in self.tensors}
        return {**_GGUF, **{part: name for part, name in family.items() if part not in usual}}

    def choose_root(self, roots: Sequence[tuple[str, str]]) -> tuple[str, str]:
        embedding = f"{self.names['embedding']}.weight"
        return next((root for root in roots if root[0] + embedding in self.tensors), roots[0])

    def all(self) -> Iterator[Parameter]:
        spec = self.spec
        table = (spec.vocab_size, spec.hidden_size)
        source = f"{self.root}{self.names['embedding']}.weight"
        yield Parameter("embedding.weight", table, "embedding", source)
        for index, layer in enumerate(spec.layers):
            yield from self.layer(layer, f"layers.{index}.", self.root + self.names["layer"].format(index))
        final = self.root + self.names["final_norm"]
        yield from self.norm(spec.final_norm, spec.hidden_size, "final_norm", final)
        if not spec.tied_head:
            yield Parameter("head.weight", table, "matrix", self.head + ".weight")
        if spec.head_bias:
            yield Parameter("head.bias", table[:1], "vector", self.head + ".bias")

    def layer(self, layer: LayerSpec, ours: str, theirs: str) -> Iterator[Parameter]:
        hidden = self.spec.hidden_size
        yield from self.norm(layer.norms.pre_mixer, hidden, ours + "norms.pre_mixer", theirs)
        yield from self.mixer(layer.mixer, ours, theirs)
        yield from self.norm(layer.norms.post_mixer, hidden, ours + "norms.post_mixer", theirs)
        yield from self.norm(layer.norms.pre_ffn, hidden, ours + "norms.pre_ffn", theirs)
        yield from self.feed_forward(layer.ffn, ours, theirs)
        yield from self.norm(layer.norms.post_ffn, hidden, ours + "norms.post_ffn", theirs)

    def mixer(self, mixer: Attention, ours: str, theirs: str) -> Iterator[Parameter]:
        hidden, q = self.spec.hidden_size, mixer.heads * mixer.head_dim
        kv = mixer.kv_heads * mixer.head_dim
        heads = (mixer.heads, mixer.kv_heads) if self.permutes_qk else (None, None)
        qkv = [
            _Projection("mixer.q", q, heads[0]),
            _Projection("mixer.k", kv, heads[1]),
            _Projection("mixer.v", kv),
        ]
        yield from self.linears(ours, theirs, qkv, hidden, mixer.qkv_bias)
        if mixer.qk_norm is not None:
            full = mixer.qk_norm_scope == "full"
            for name, width in (("mixer.q_norm", q), ("mixer.k_norm", kv)):
                source = theirs + self.names[name]
                yield from self.norm(mixer.qk_norm, width if full else mixer.head_dim, ours + name, source)
        yield from self.linears(ours, theirs, [_Projection("mixer.o", hidden)], q, mixer.output_bias)

    def feed_forward(self, ffn: FeedForward, ours: str, theirs: str) -> Iterator[Parameter]:
        hidden = self.spec.hidden_size
        if isinstance(ffn, MoE):
            yield from self.experts(ffn, ours, theirs)
            return
        up = [_Projection("ffn.gate", ffn.hidden_size)] if ffn.gated else []
        up.append(_Projection("ffn.up", ffn.hidden_size))
        yield from self.linears(ours, theirs, up, hidden, ffn.bias)
        yield from self.linears(ours, theirs, [_Projection("ffn.down", hidden)], ffn.hidden_size, ffn.bias)

    def experts(self, ffn: MoE, ours: str, theirs: str) -> Iterator[Parameter]:
        hidden, names = self.spec.hidden_size, self.names
        if not self.gguf and theirs + _STACKED_EXPERTS["ffn.experts.down"] in self.tensors:
            names = names | _STACKED_EXPERTS
        elif self.gguf and theirs + _GGUF_EXPERTS["ffn.experts.gate"].format(0) in self.tensors:
            names = names | _GGUF_EXPERTS
        source = f"{theirs}{names['ffn.router']}.weight"
        yield Parameter(f"{ours}ffn.router.weight", (ffn.experts, hidden), "router", source)
        shapes = {"gate": (ffn.hidden_size, hidden), "up": (ffn.hidden_size, hidden)}
        shapes["down"] = (hidden, ffn.hidden_size)
        sources = {part: theirs + names[f"ffn.experts.{part}"] for part in shapes}
        for expert in range(ffn.experts):
            taken: Counter[str] = Counter()
            for part, shape in shapes.items():
                source, name = sources[part], f"{ours}ffn.experts.{expert}.{part}.weight"
                if "{}" in source:
                    yield Parameter(name, shape, "matrix", source.format(expert))
                    continue
                an_expert = sum(shapes[other][0] for other in shapes if sources[other] == source)
                first = expert * an_expert + taken[source]
                taken[source] += shape[0]
                yield Parameter(name, shape, "matrix", source, rows=(first, first + shape[0]))

    def linears(
        self, ours: str, theirs: str, projections: Sequence[_Projection], columns: int, bias: bool
    ) -> Iterator[Parameter]:
        """Weights and biases of projections of the same input."""
        shared = Counter(self.names[projection.name] for projection in projections)
        taken: Counter[str] = Counter()
        for projection in projections:
            stem, count = self.names[projection.name], projection.rows
            first = taken[stem]
            taken[stem] += count
            rows = (first, first + count) if shared[stem] > 1 else None
            name, source, heads = ours + projection.name, theirs + stem, projection.heads
            yield Parameter(f"{name}.weight", (count, columns), "matrix", f"{source}.weight", rows, heads)
            if bias:
                yield Parameter(f"{name}.bias", (count,), "vector", f"{source}.bias", rows, heads)

    def norm(self, norm: Norm | None, width: int, ours: str, theirs: str) -> Iterator[Parameter]:
        """`theirs` is the full source name, or the layer's prefix for one of the four layer norms."""
        if norm is None:
            return
        source = theirs + self.norms[ours.rpartition(".")[2]] if theirs.endswith(".") else theirs
        add = -norm.offset if self.adds_offset else 0.0
        yield Parameter(f"{ours}.weight", (width,), "vector", f"{source}.weight", add=add)
        if norm.bias:
            yield Parameter(f"{ours}.bias", (width,), "vector", f"{source}.bias")
