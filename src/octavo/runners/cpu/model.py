"""A ModelSpec and its packed weights as the structs the library reads.

Every size is checked here, once: the library trusts what it is given. Shape letters: N output rows, K input
columns, D head dim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from octavo.models.parameters import Parameter
from octavo.models.spec import Attention, DenseMLP, LayerSpec, ModelSpec, MoE, Norm, Rope
from octavo.quant.codebook import Codebook
from octavo.runners.base import RunnerConfig
from octavo.runners.bundles import VECTORS, bundle_name, part_name, vector_places
from octavo.runners.cpu import library
from octavo.runners.cpu.layout import alternate, encoding_of
from octavo.runners.cpu.library import Activation, NormKind
from octavo.runners.cpu.limits import row_capacity
from octavo.settings import ActivationsName
from octavo.weights import StoredBundle

_ACTIVATIONS = {"silu": Activation.SILU, "gelu": Activation.GELU, "gelu_tanh": Activation.GELU_TANH}
_NORM_KINDS = {"rms": NormKind.RMS, "layernorm": NormKind.LAYERNORM}


@dataclass(frozen=True, slots=True)
class NativeModel:
    """The struct, and everything its pointers lead to."""

    struct: library.Model
    arrays: tuple[object, ...]
    """Kept alive as long as the library uses the struct."""
    weight_bytes: int
    """Of the packed arrays and the copied vectors."""


def build_model(
    spec: ModelSpec,
    weights: Mapping[str, StoredBundle],
    config: RunnerConfig,
    *,
    isa: int,
    lanes: int,
    threads: int,
    activations: ActivationsName,
) -> NativeModel:
    """The library's view of `weights` in layout `cpu-r{lanes}-1`."""
    return _Builder(spec, weights, lanes, activations).build(config, isa, threads)


def native_table(values: np.ndarray) -> library.Table:
    """fp32 [16] as kernels use it: whole multiples of a step, the largest at most 2,047 of them so that 32 products
    with an int16 fit 32 bits. Of all such steps the one whose worst entry is off by least: 0 for iq4 and fp4."""
    exact = values.astype(np.float64)
    steps = np.abs(exact).max() / np.arange(2047, 1023, -1)
    errors = np.abs(np.round(exact / steps[:, None]) * steps[:, None] - exact).max(-1)
    step = float(steps[errors.argmin()])
    return library.Table(
        values=(ctypes.c_float * 16)(*values.tolist()),
        steps=(ctypes.c_int16 * 16)(*np.round(exact / step).astype(int).tolist()),
        step=step,
    )


class _Builder:
    def __init__(
        self, spec: ModelSpec, weights: Mapping[str, StoredBundle], lanes: int, activations: ActivationsName
    ) -> None:
        self._spec = spec
        self._weights = weights
        self._lanes = lanes
        self._activations = activations
        self._kept: list[object] = []
        self._tables: dict[Codebook, library.Table] = {}
        self._vectors: dict[str, np.ndarray] = {}
        if VECTORS in weights:
            bundle = weights[VECTORS]
            values = bundle.arrays[VECTORS]
            for parameter, start in vector_places(bundle.parameters):
                self._vectors[parameter.name] = values[start : start + parameter.shape[0]]

    def build(self, config: RunnerConfig, isa: int, threads: int) -> NativeModel:
        spec = self._spec
        hidden, vocab = spec.hidden_size, spec.vocab_size
        embedding = self._matrix("embedding.weight", vocab, hidden)
        head = library.Matrix.from_buffer_copy(embedding)
        if not spec.tied_head:
            head = self._matrix("head.weight", vocab, hidden)
        if spec.head_bias:
            head.bias = self._pointer(self._vector("head.bias", vocab))
        ropes = list(dict.fromkeys(x.mixer.rope for x in spec.layers if x.mixer.rope is not None))
        groups = {layer: i for i, group in enumerate(spec.kv_groups) for layer in group.layers}
        layers = (library.Layer * len(spec.layers))(
            *(self._layer(i, layer, ropes, groups[i]) for i, layer in enumerate(spec.layers))
        )
        native_ropes = (library.Rope * max(1, len(ropes)))(*map(self._rope, ropes))
        kv_pages = (ctypes.c_int32 * len(config.kv_pages))(*config.kv_pages)
        assert len(config.kv_pages) == len(spec.kv_groups)
        struct = library.Model(
            embedding=embedding,
            head=head,
            final_norm=self._norm("final_norm", spec.final_norm, hidden),
            layers=layers,
            ropes=native_ropes,
            kv_pages=kv_pages,
            layer_count=len(layers),
            rope_count=len(ropes),
            kv_groups=len(kv_pages),
            vocab_size=vocab,
            hidden_size=hidden,
            embedding_multiplier=spec.embedding_multiplier,
            logits_multiplier=spec.logits_multiplier,
            final_softcap=spec.final_softcap or 0.0,
            max_slots=config.max_slots,
            row_capacity=row_capacity(config),
            isa=isa,
            threads=threads,
        )
        self._kept += [layers, native_ropes, kv_pages]
        arrays = {id(a): a for bundle in self._weights.values() for a in bundle.arrays.values()}
        weight_bytes = sum(array.nbytes for array in arrays.values())
        return NativeModel(struct, (*self._kept, self._tables), weight_bytes)

    def _layer(self, index: int, layer: LayerSpec, ropes: list[Rope], kv_group: int) -> library.Layer:
        mixer, ffn, hidden = layer.mixer, layer.ffn, self._spec.hidden_size
        prefix = f"layers.{index}."
        native = library.Layer(
            residual_multiplier=layer.residual_multiplier,
            rope=-1 if mixer.rope is None else ropes.index(mixer.rope),
            activation=_ACTIVATIONS[ffn.activation],
            kv_group=kv_group,
            parallel=layer.parallel,
        )
        self._attention(native, mixer, prefix)
        if isinstance(ffn, DenseMLP):
            self._dense(native, ffn, prefix)
        else:
            self._experts(native, ffn, prefix)
        for name in ("pre_mixer", "post_mixer", "pre_ffn", "post_ffn"):
            norm = getattr(layer.norms, name)
            if norm is not None:
                setattr(native, name, self._norm(f"{prefix}norms.{name}", norm, hidden))
        return native

    def _attention(self, native: library.Layer, mixer: Attention, prefix: str) -> None:
        hidden = self._spec.hidden_size
        q_rows, kv_rows = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
        assert mixer.heads % mixer.kv_heads == 0
        native.q = self._linear(f"{prefix}mixer.q", q_rows, hidden, mixer.qkv_bias)
        native.k = self._linear(f"{prefix}mixer.k", kv_rows, hidden, mixer.qkv_bias)
        native.v = self._linear(f"{prefix}mixer.v", kv_rows, hidden, mixer.qkv_bias)
        native.o = self._linear(f"{prefix}mixer.o", hidden, q_rows, mixer.output_bias)
        native.heads, native.kv_heads, native.head_dim = mixer.heads, mixer.kv_heads, mixer.head_dim
        native.score_scale, native.score_softcap = mixer.scale, mixer.softcap or 0.0
        native.window = mixer.window or 0
        native.qk_norm_full = mixer.qk_norm_scope == "full"
        if mixer.qk_norm is not None:
            full = mixer.qk_norm_scope == "full"
            for name, rows in (("q_norm", q_rows), ("k_norm", kv_rows)):
                width = rows if full else mixer.head_dim
                setattr(native, name, self._norm(f"{prefix}mixer.{name}", mixer.qk_norm, width))

    def _dense(self, native: library.Layer, ffn: DenseMLP, prefix: str) -> None:
        hidden = self._spec.hidden_size
        native.up = self._linear(f"{prefix}ffn.up", ffn.hidden_size, hidden, ffn.bias)
        native.down = self._linear(f"{prefix}ffn.down", hidden, ffn.hidden_size, ffn.bias)
        if ffn.gated:
            native.gate = self._linear(f"{prefix}ffn.gate", ffn.hidden_size, hidden, ffn.bias)

    def _experts(self, native: library.Layer, ffn: MoE, prefix: str) -> None:
        hidden = self._spec.hidden_size
        assert 0 < ffn.experts_per_token <= ffn.experts
        native.router = self._linear(f"{prefix}ffn.router", ffn.experts, hidden, False)
        experts = (library.Expert * ffn.experts)()
        for index, expert in enumerate(experts):
            name = f"{prefix}ffn.experts.{index}."
            expert.gate = self._linear(f"{name}gate", ffn.hidden_size, hidden, False)
            expert.up = self._linear(f"{name}up", ffn.hidden_size, hidden, False)
            expert.down = self._linear(f"{name}down", hidden, ffn.hidden_size, False)
        self._kept.append(experts)
        native.experts = experts
        native.expert_count, native.experts_per_token = ffn.experts, ffn.experts_per_token
        native.normalized = ffn.normalized

    def _rope(self, rope: Rope) -> library.Rope:
        frequencies = np.array(rope.inverse_frequencies, dtype=np.float32)
        assert len(frequencies) == rope.rotary_dim // 2
        return library.Rope(
            inverse_frequencies=self._pointer(frequencies),
            pairs=len(frequencies),
            attention_factor=rope.attention_factor,
        )

    def _norm(self, name: str, norm: Norm, width: int) -> library.Norm:
        gain = np.float32(norm.offset) + self._vector(f"{name}.weight", width)
        bias = self._pointer(self._vector(f"{name}.bias", width)) if norm.bias else None
        return library.Norm(gain=self._pointer(gain), bias=bias, kind=_NORM_KINDS[norm.kind], eps=norm.eps)

    def _linear(self, name: str, rows: int, columns: int, bias: bool) -> library.Matrix:
        matrix = self._matrix(f"{name}.weight", rows, columns)
        if bias:
            matrix.bias = self._pointer(self._vector(f"{name}.bias", rows))
        return matrix

    def _matrix(self, name: str, rows: int, columns: int) -> library.Matrix:
        bundle = self._weights[bundle_name(Parameter(name, (rows, columns), "matrix", ""))]
        index = [parameter.name for parameter in bundle.parameters].index(name)
        parameter, chosen = bundle.parameters[index], bundle.formats[index]
        assert parameter.shape == (rows, columns), f"{name} is {parameter.shape}"
        encoding = encoding_of(chosen, columns, self._lanes)
        assert encoding is not None, f"{chosen.name} was declined"
        step, first = 1, 0
        if alternate(bundle.parameters, bundle.formats):
            array, step, first = bundle.arrays["gate_up"], 2, index
        else:
            array = bundle.arrays[part_name(parameter)]
        blocks = -(-rows // self._lanes)
        assert array.shape == (step * blocks, encoding.block_bytes)
        assert array.flags.c_contiguous
        assert array.dtype == np.uint8
        table = self._table(chosen) if isinstance(chosen, Codebook) and chosen.bits == 4 else None
        return library.Matrix(
            blocks=self._pointer(array) + first * encoding.block_bytes,
            bias=None,
            table=None if table is None else ctypes.pointer(table),
            block_bytes=step * encoding.block_bytes,
            rows=rows,
            columns=columns,
            codec=encoding.codec,
            numbers=encoding.numbers,
            group=encoding.group,
            int8_activations=encoding.takes_int8 and self._activations == "int8",
        )

    def _table(self, chosen: Codebook) -> library.Table:
        if chosen not in self._tables:
            self._tables[chosen] = native_table(chosen.values)
        return self._tables[chosen]

    def _vector(self, name: str, width: int) -> np.ndarray:
        vector = self._vectors[name]
        assert vector.shape == (width,)
        assert vector.dtype == np.float32
        return vector

    def _pointer(self, array: np.ndarray) -> int:
        self._kept.append(array)
        return int(array.ctypes.data)
