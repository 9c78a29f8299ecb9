"""What the CUDA runner declines, and says so; and the sizes its plan counts with. Needs no card."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from octavo.models.spec import Attention, DenseMLP, LayerNorms, LayerSpec, ModelSpec, Norm
from octavo.quant.affine import INT8, LLM_INT8, Q4_1, Affine
from octavo.quant.plain import Plain
from octavo.runners.base import RunnerConfig
from octavo.runners.cuda import kind as module
from octavo.runners.cuda import limits
from octavo.runners.cuda.kind import CudaRunnerKind
from octavo.runners.cuda.layout import encoding_of
from octavo.runners.cuda.limits import batch_buckets
from octavo.runners.reference import ReferenceKind

RMS = Norm("rms", 1e-5)
MIXER = Attention(8, 2, 64, 0.1, None)
LAYER = LayerSpec(LayerNorms(RMS, None, RMS, None), MIXER, DenseMLP(256, "silu"))
SPEC = ModelSpec("tiny", 100, 128, (LAYER,), RMS, 512, True)
CONFIG = RunnerConfig("cuda:0", "bfloat16", "bfloat16", 512, 4, (64,), 512)


def of(**mixer: Any) -> ModelSpec:
    return replace(SPEC, layers=(replace(LAYER, mixer=replace(MIXER, **mixer)),))


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_declines_card", lambda device: None)


@pytest.mark.parametrize(
    ("spec", "formats", "config", "reason"),
    [
        (SPEC, [INT8, Q4_1, Plain("f32")], CONFIG, None),
        (SPEC, [INT8], replace(CONFIG, device="cpu"), "not on cpu"),
        (SPEC, [INT8], replace(CONFIG, compute_dtype="float32"), "not in float32"),
        (SPEC, [INT8], replace(CONFIG, kv_dtype="int8"), None),
        (SPEC, [INT8], replace(CONFIG, kv_dtype="float32"), "not in float32"),
        (SPEC, [INT8], replace(CONFIG, max_slots=200), "128 sequences"),
        (SPEC, [Affine("odd", 8, 40, "none", "f16", "step", "ggml")], CONFIG, "format odd"),
        (of(head_dim=320), [INT8], CONFIG, "heads of 320"),
        (of(heads=40), [INT8], CONFIG, "20 heads share a key"),
        (of(qk_norm=Norm("layernorm", 1e-5)), [INT8], CONFIG, "layernorm"),
        (replace(SPEC, layers=(replace(LAYER, parallel=True),)), [INT8], CONFIG, "parallel"),
    ],
)
def test_reasons(spec: Any, formats: Any, config: Any, reason: str | None) -> None:
    found = CudaRunnerKind().declines(spec, formats, config)
    assert found is None if reason is None else reason in (found or "")


def test_int8_activations_are_for_int8_weights_and_not_for_one_arithmetic() -> None:
    kind = CudaRunnerKind("int8")
    assert kind.declines(SPEC, [LLM_INT8, Q4_1], CONFIG) is None
    assert "not for q4_1" in (kind.declines(SPEC, [Q4_1], CONFIG) or "")
    deterministic = replace(CONFIG, deterministic=True)
    assert "for prompts alone" in (kind.declines(SPEC, [INT8], deterministic) or "")
    assert CudaRunnerKind().declines(SPEC, [INT8], deterministic) is None
    assert "how a prompt is cut" in (ReferenceKind().declines(SPEC, [INT8], deterministic) or "")


def test_deterministic_steps_have_as_many_rows_as_the_largest_batch() -> None:
    assert limits.deterministic_rows(1) == 64
    assert limits.deterministic_rows(100) == 128
    small, large = (limits.activation_bytes(SPEC, replace(CONFIG, deterministic=d)) for d in (False, True))
    assert small < large


def test_a_row_in_bytes() -> None:
    encoding = encoding_of(INT8)
    assert encoding is not None
    assert encoding.row_bytes(100) == 128 + 2 * 2
    four = encoding_of(Q4_1)
    assert four is not None
    assert four.row_bytes(128) == 64 + 4 * 4


def test_every_batch_has_a_bucket() -> None:
    assert batch_buckets(1) == (1,)
    assert batch_buckets(5) == (1, 2, 4, 8)
    assert batch_buckets(128)[-1] == 128
