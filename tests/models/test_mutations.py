"""Flipping any flag of a spec must change the logits: no field may be decoration.

The bound is 1e-5, since erf and tanh GELU differ by no more; agreement with transformers is about 1e-6.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from octavo.models.spec import Attention, DenseMLP, LayerNorms, LayerSpec, ModelSpec, MoE, Norm, Rope

_MUTATIONS: dict[tuple[type, str], list[Any]] = {
    (Norm, "kind"): ["layernorm"],
    (Norm, "eps"): [30.0],
    (Norm, "offset"): [0.5],
    (Rope, "rotary_dim"): [8],
    (Rope, "inverse_frequencies"): ["halved"],
    (Rope, "attention_factor"): [1.3],
    (Attention, "scale"): [0.31],
    (Attention, "rope"): [None],
    (Attention, "window"): [11, 23],
    (Attention, "softcap"): [0.7],
    (DenseMLP, "activation"): ["silu", "gelu", "gelu_tanh"],
    (MoE, "experts_per_token"): [1, 4],
    (MoE, "activation"): ["silu", "gelu", "gelu_tanh"],
    (MoE, "normalized"): [True, False],
    (LayerSpec, "parallel"): [True, False],
    (LayerSpec, "residual_multiplier"): [0.5],
    (ModelSpec, "embedding_multiplier"): [2.5],
    (ModelSpec, "logits_multiplier"): [0.5],
    (ModelSpec, "final_softcap"): [1.1],
}
"""Field -> other values. Norm kinds and biases that need weights the checkpoint lacks are in the next table."""

_CHECKED_ELSEWHERE = {
    (Norm, "bias"): "needs a tensor; a model without it fails to load",
    (Rope, "kind"): "says where the frequencies came from; the frequencies are mutated",
    (Rope, "base"): "as kind",
    (Attention, "heads"): "fixed by the shapes of the tensors",
    (Attention, "kv_heads"): "fixed by the shapes of the tensors",
    (Attention, "head_dim"): "fixed by the shapes of the tensors",
    (Attention, "qkv_bias"): "test_dropped_biases",
    (Attention, "output_bias"): "test_dropped_biases",
    (Attention, "qk_norm"): "test_dropped_qk_norms",
    (Attention, "qk_norm_scope"): "fixed by the shapes of the tensors",
    (Rope, "reason"): "words",
    (DenseMLP, "hidden_size"): "fixed by the shapes of the tensors",
    (DenseMLP, "gated"): "fixed by the shapes of the tensors",
    (DenseMLP, "bias"): "test_dropped_biases",
    (MoE, "experts"): "fixed by the shapes of the tensors",
    (MoE, "hidden_size"): "fixed by the shapes of the tensors",
    (LayerNorms, "pre_mixer"): "test_dropped_norms",
    (LayerNorms, "post_mixer"): "test_dropped_norms",
    (LayerNorms, "pre_ffn"): "test_dropped_norms",
    (LayerNorms, "post_ffn"): "test_dropped_norms",
    (LayerSpec, "norms"): "each field mutated",
    (LayerSpec, "mixer"): "each field mutated",
    (LayerSpec, "ffn"): "each field mutated",
    (ModelSpec, "family"): "a label",
    (ModelSpec, "vocab_size"): "fixed by the shapes of the tensors",
    (ModelSpec, "hidden_size"): "fixed by the shapes of the tensors",
    (ModelSpec, "layers"): "each field mutated",
    (ModelSpec, "final_norm"): "each field mutated",
    (ModelSpec, "max_context_tokens"): "a limit, not arithmetic",
    (ModelSpec, "tied_head"): "test_untied_head",
    (ModelSpec, "head_bias"): "needs a tensor",
}


def test_every_field_of_the_spec_has_a_mutation_or_a_reason():
    fields = {
        (cls, f.name)
        for cls in (Norm, Rope, Attention, DenseMLP, MoE, LayerNorms, LayerSpec, ModelSpec)
        for f in dataclasses.fields(cls)
    }
    assert fields == set(_MUTATIONS) | set(_CHECKED_ELSEWHERE)
    assert not set(_MUTATIONS) & set(_CHECKED_ELSEWHERE)


def mutants(value: Any) -> Iterator[tuple[str, Any]]:
    """(what changed, value with one field changed), for each field anywhere below a dataclass."""
    for field in dataclasses.fields(value):
        current = getattr(value, field.name)
        for other in _MUTATIONS.get((type(value), field.name), []):
            if other == "halved":
                other = tuple(f / 2 for f in current)
            if other == current or (field.name == "rotary_dim" and current <= other):
                continue
            mutant = replace(value, **{field.name: other})
            if field.name == "rotary_dim":
                mutant = replace(mutant, inverse_frequencies=mutant.inverse_frequencies[: other // 2])
            yield f"{type(value).__name__}.{field.name}={other!r:.20}", mutant
        if dataclasses.is_dataclass(current):
            for name, mutant in mutants(current):
                yield f"{field.name}.{name}", replace(value, **{field.name: mutant})


def changed(model: Any, ids: list[int], spec: ModelSpec) -> float:
    """Relative difference of the logits under another spec."""
    return difference(model.our_logits(ids), model.our_logits(ids, spec))


def difference(truth: torch.Tensor, mutant: torch.Tensor) -> float:
    return float((truth - mutant).norm() / truth.norm())


@pytest.mark.parametrize("layer", [0, 1])
def test_flipping_a_flag_changes_the_logits(family, layer, tiny, prompt_ids):
    model, ids = tiny(family), prompt_ids[:40]  # longer than any window
    layers = model.spec.layers
    truth = model.our_logits(ids)
    found = list(mutants(layers[layer]))
    assert len(found) >= 8
    for name, mutant in found:
        spec = replace(model.spec, layers=(*layers[:layer], mutant, *layers[layer + 1 :]))
        assert difference(truth, model.our_logits(ids, spec)) > 1e-5, name
    for name, spec in mutants(model.spec):
        assert difference(truth, model.our_logits(ids, spec)) > 1e-5, name


def test_dropped_norms(tiny, prompt_ids):
    model = tiny("gemma2")
    layer = model.spec.layers[1]
    for norm in dataclasses.fields(LayerNorms):
        without = replace(layer, norms=replace(layer.norms, **{norm.name: None}))
        spec = replace(model.spec, layers=(model.spec.layers[0], without, *model.spec.layers[2:]))
        assert changed(model, prompt_ids, spec) > 1e-4, norm.name


@pytest.mark.parametrize("family", ["qwen3", "olmo2"])
def test_dropped_qk_norms(family, tiny, prompt_ids):
    model = tiny(family)
    first, *others = model.spec.layers
    without = replace(first, mixer=replace(first.mixer, qk_norm=None))
    assert changed(model, prompt_ids, replace(model.spec, layers=(without, *others))) > 1e-4


def test_dropped_biases(tiny, prompt_ids):
    model = tiny("llama-biases")
    layer = model.spec.layers[0]
    for spec in (
        replace(layer, mixer=replace(layer.mixer, qkv_bias=False)),
        replace(layer, mixer=replace(layer.mixer, output_bias=False)),
        replace(layer, ffn=replace(layer.ffn, bias=False)),
    ):
        assert changed(model, prompt_ids, replace(model.spec, layers=(spec, *model.spec.layers[1:]))) > 1e-4


def test_untied_head(tiny, prompt_ids):
    model = tiny("llama")
    assert not model.spec.tied_head
    assert changed(model, prompt_ids, replace(model.spec, tied_head=True)) > 1e-4


def test_an_unchanged_spec_changes_nothing(case, tiny, prompt_ids):
    """The negative control of the tests above."""
    model = tiny(case)
    assert changed(model, prompt_ids, replace(model.spec)) == 0
    assert torch.isfinite(model.our_logits(prompt_ids)).all()
