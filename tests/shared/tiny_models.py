"""Tiny random models of every structural flag, and what drives a runner through them: for the tests of every runner.

Not a test: conftest.py files import it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from octavo.models.naming import FamilyNames, parameters
from octavo.models.parameters import Parameter
from octavo.models.spec import (
    KV_PAGE_TOKENS,
    Attention,
    DenseMLP,
    LayerNorms,
    LayerSpec,
    ModelSpec,
    MoE,
    Norm,
    Rope,
)
from octavo.quant.affine import INT8
from octavo.quant.format import Format, Layout
from octavo.quant.logical_layout import REF1
from octavo.quant.plain import Plain
from octavo.runners.base import Batch, Chunk, Runner, RunnerConfig, SlotState
from octavo.runners.cpu.kind import CpuRunnerKind
from octavo.runners.cpu.library import IsaName
from octavo.runners.cpu.runner import CpuRunner
from octavo.runners.reference import ReferenceKind
from octavo.runners.reference.runner import ReferenceRunner
from octavo.settings import ActivationsName
from octavo.types import Sampling
from octavo.weights import WeightStore, open_weights

CONTEXT_TOKENS = 512
VOCABULARY = 203
_RMS = Norm("rms", 1e-5)
_NAMES = FamilyNames(
    huggingface_norms={name: f"norm_{name}" for name in ("pre_mixer", "post_mixer", "pre_ffn", "post_ffn")},
    gguf_norms={},
)


def rope(pairs: int, attention_factor: float = 1.0) -> Rope:
    frequencies = tuple(float(1000.0 ** (-i / pairs)) for i in range(pairs))
    return Rope("default", 1000.0, 2 * pairs, frequencies, attention_factor)


def attention(**changes: Any) -> Attention:
    values: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 24, "scale": 0.2, "rope": rope(12)}
    return Attention(**(values | changes))


def layer(
    mixer: Attention | None = None,
    ffn: DenseMLP | MoE | None = None,
    norms: LayerNorms | None = None,
    **more: Any,
) -> LayerSpec:
    return LayerSpec(
        norms=norms or LayerNorms(_RMS, None, _RMS, None),
        mixer=mixer or attention(),
        ffn=ffn or DenseMLP(88, "silu"),
        **more,
    )


def model(*layers: LayerSpec, **changes: Any) -> ModelSpec:
    values: dict[str, Any] = {
        "family": "tiny",
        "vocab_size": VOCABULARY,
        "hidden_size": 72,
        "layers": layers or (layer(), layer()),
        "final_norm": _RMS,
        "max_context_tokens": CONTEXT_TOKENS,
        "tied_head": False,
    }
    return ModelSpec(**(values | changes))


_OFFSET = Norm("rms", 1e-6, offset=1.0)
_LAYERNORM = Norm("layernorm", 1e-5, bias=True)
MODELS: Mapping[str, ModelSpec] = {
    "plain": model(),
    "tied": model(tied_head=True),
    "mha": model(layer(attention(heads=3, kv_heads=3))),
    "one-kv-head": model(layer(attention(heads=9, kv_heads=1))),
    "head-dim-64": model(layer(attention(head_dim=64, rope=rope(32)))),
    "head-dim-8": model(layer(attention(head_dim=8, rope=rope(4)))),
    "head-dim-256": model(layer(attention(heads=2, kv_heads=1, head_dim=256, rope=rope(128)))),
    "partial-rotary": model(layer(attention(rope=rope(5)))),
    "no-rope": model(layer(attention(rope=None)), layer()),
    "attention-factor": model(layer(attention(rope=rope(12, 1.3)))),
    "two-ropes": model(layer(), layer(attention(rope=rope(7)))),
    "window": model(layer(attention(window=40)), layer(), layer(attention(window=5))),
    "softcap": model(layer(attention(softcap=0.5)), final_softcap=0.7),
    "biases": model(
        layer(attention(qkv_bias=True, output_bias=True), DenseMLP(88, "silu", bias=True)), head_bias=True
    ),
    "qk-norm": model(layer(attention(qk_norm=_RMS))),
    "qk-norm-full": model(layer(attention(qk_norm=_OFFSET, qk_norm_scope="full"))),
    "post-norms": model(layer(norms=LayerNorms(_OFFSET, _OFFSET, _OFFSET, _OFFSET))),
    "only-post-norms": model(layer(norms=LayerNorms(None, _RMS, None, _RMS))),
    "layernorm": model(layer(norms=LayerNorms(_LAYERNORM, None, _LAYERNORM, None)), final_norm=_LAYERNORM),
    "gelu": model(layer(ffn=DenseMLP(88, "gelu"))),
    "gelu-tanh": model(layer(ffn=DenseMLP(88, "gelu_tanh"))),
    "not-gated": model(layer(ffn=DenseMLP(88, "gelu", gated=False, bias=True))),
    "multipliers": model(layer(residual_multiplier=0.4), embedding_multiplier=3.0, logits_multiplier=0.25),
    "parallel": model(
        layer(norms=LayerNorms(_LAYERNORM, None, None, None), parallel=True),
        layer(ffn=DenseMLP(88, "gelu", gated=False), parallel=True),
        final_norm=_LAYERNORM,
    ),
    "parallel-two-norms": model(
        layer(norms=LayerNorms(_RMS, _RMS, _OFFSET, _RMS), parallel=True, residual_multiplier=0.7), layer()
    ),
    "experts": model(layer(ffn=MoE(5, 2, 88, "silu", True)), layer()),
    "many-experts": model(
        layer(ffn=MoE(33, 7, 40, "gelu_tanh", False)), layer(ffn=MoE(3, 3, 88, "silu", False))
    ),
    "parallel-experts": model(
        layer(norms=LayerNorms(_RMS, None, None, _RMS), ffn=MoE(6, 2, 24, "silu", True), parallel=True)
    ),
    "head-dim-80": model(layer(attention(head_dim=80, rope=rope(10)))),
    "head-dim-100": model(layer(attention(heads=2, kv_heads=1, head_dim=100, rope=rope(50)))),
    "head-dim-5": model(layer(attention(heads=6, kv_heads=2, head_dim=5, rope=rope(2)))),
    "odd-sizes": model(layer(ffn=DenseMLP(101, "silu")), hidden_size=77, vocab_size=131),
}


@dataclass(frozen=True)
class ArrayTensor:
    """A TensorRef over values in memory."""

    name: str
    shape: tuple[int, ...]
    values: np.ndarray = field(repr=False)
    dtype: str = "f32"

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def read(self) -> np.ndarray:
        return self.values


@dataclass(frozen=True)
class Tiny:
    """A spec and random weights, large enough for every norm, bias and cap to matter."""

    spec: ModelSpec
    parameters: tuple[Parameter, ...]
    tensors: Mapping[str, ArrayTensor]
    formats: Mapping[str, Format]

    def open(self, layout: Layout) -> WeightStore:
        return open_weights(
            model="tiny",
            fingerprint="f" * 64,
            tensors=self.tensors,
            parameters=self.parameters,
            formats=self.formats,
            layout=layout,
            cache_dir=None,
            use_cache=False,
        )

    def native(self, isa: IsaName, *, activations: ActivationsName = "int16", **changes: Any) -> CpuRunner:
        kind, config = CpuRunnerKind(isa, activations), runner_config(self.spec, **changes)
        assert kind.declines(self.spec, list(self.formats.values()), config) is None
        runner = kind.create(self.spec, self.open(kind.layout), config)
        assert isinstance(runner, CpuRunner)
        return runner

    def reference(self) -> Runner:
        config = runner_config(self.spec)
        return ReferenceKind().create(self.spec, self.open(REF1), config)


def make_tiny(spec: ModelSpec, format: Format = INT8, seed: int = 0) -> Tiny:
    listed = parameters(spec, _NAMES, "huggingface")
    generator = np.random.default_rng(seed)
    tensors, formats = {}, {}
    for parameter in listed:
        width = parameter.shape[-1]
        values = generator.normal(0, 1, parameter.shape).astype(np.float32)
        values = values * 1.6 / np.sqrt(width) if parameter.role == "matrix" else values
        if parameter.role == "vector":
            values = 0.7 + 0.5 * values
        tensors[parameter.source] = ArrayTensor(parameter.source, parameter.shape, values.astype(np.float32))
        formats[parameter.name] = Plain("f32") if parameter.role in ("vector", "router") else format
    return Tiny(spec, listed, tensors, formats)


def runner_config(
    spec: ModelSpec, *, threads: int = 1, slots: int = 4, chunk: int = 512, pages: int | None = None
) -> RunnerConfig:
    """`pages`: of each group; those of `slots` full contexts where it is not said."""
    pages = pages or slots * (CONTEXT_TOKENS // KV_PAGE_TOKENS)
    return RunnerConfig(
        device="cpu",
        compute_dtype="float32",
        kv_dtype="float16",
        context_tokens=CONTEXT_TOKENS,
        max_slots=slots,
        kv_pages=(pages,) * len(spec.kv_groups),
        prefill_chunk_tokens=chunk,
        threads=threads,
    )


def page_tables(spec: ModelSpec, slot: int, tokens: int) -> tuple[tuple[int, ...], ...]:
    """A sequence's pages in every group: its own, in no order a kernel could rely on."""
    a_slot = CONTEXT_TOKENS // KV_PAGE_TOKENS
    needed = -(-tokens // KV_PAGE_TOKENS)
    order = tuple(slot * a_slot + (7 * i + 3) % a_slot for i in range(needed))
    return (order,) * len(spec.kv_groups)


def prompt(tokens: int, seed: int = 0, vocabulary: int = VOCABULARY) -> tuple[int, ...]:
    return tuple(int(i) for i in np.random.default_rng(seed).integers(0, vocabulary, tokens))


@dataclass
class Driver:
    """Runs sequences on a runner and collects what it says. Slots are opened once, with the whole prompt."""

    spec: ModelSpec
    runner: Runner

    def open(self, slot: int, ids: Sequence[int], sampling: Sampling | None = None) -> None:
        self.runner.open_slot(slot, SlotState(ids, len(ids), sampling or Sampling(temperature=0.0)))

    def chunk(self, slot: int, start: int, ids: Sequence[int] | None, **more: Any) -> Chunk:
        tokens = 1 if ids is None else len(ids)
        return Chunk(
            slot,
            start,
            None if ids is None else tuple(ids),
            page_tables(self.spec, slot, start + tokens),
            more.pop("sample", True),
            **more,
        )

    def logits(self, *chunks: Chunk) -> np.ndarray:
        """Of each chunk's last row: [chunks, V]."""
        assert isinstance(self.runner, CpuRunner)
        self.runner.forward(Batch(chunks))
        return np.stack([self.runner.logits(chunk.slot) for chunk in chunks])

    def reference_logits(self, slot: int, ids: Sequence[int]) -> np.ndarray:
        """fp32 [T, V]: the reference runner's logits of every row of a prompt."""
        assert isinstance(self.runner, ReferenceRunner)
        model, cache = self.runner._model, self.runner._cache
        assert model is not None
        assert cache is not None
        spans = cache.spans(page_tables(self.spec, slot, len(ids)), 0, len(ids))
        with torch.inference_mode():
            return model.logits(model.forward(torch.tensor(ids), 0, spans, cache)).numpy()
