"""Whole tiny models against the reference runner on the same packed weights: one for every structural flag."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from octavo.models.spec import ModelSpec
from octavo.quant.affine import INT4, INT8, LLM_INT8, Q4_1, Q8_0
from octavo.quant.codebook import NF4
from octavo.quant.format import Format
from octavo.quant.plain import Plain

TOKENS = 150

FORMATS: Sequence[Format] = (INT8, LLM_INT8, INT4, NF4, Q8_0, Q4_1, Plain("f32"), Plain("f16"), Plain("bf16"))


def divergence(want: np.ndarray, got: np.ndarray) -> float:
    """Mean KL divergence of rows of logits."""
    p, q = (x.astype(np.float64) for x in (want, got))
    p = p - p.max(-1, keepdims=True)
    q = q - q.max(-1, keepdims=True)
    log_p = p - np.log(np.exp(p).sum(-1, keepdims=True))
    log_q = q - np.log(np.exp(q).sum(-1, keepdims=True))
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


def test_every_flag(
    isa: Any, spec: ModelSpec, tiny: Callable[..., Any], drive: Callable[..., Any], tokens: Callable[..., Any]
) -> None:
    made = tiny(spec)
    ids = tokens(TOKENS, vocabulary=spec.vocab_size)
    theirs, ours = drive(spec, made.reference()), drive(spec, made.native(isa))
    ours.open(0, ids)
    want = theirs.reference_logits(0, ids)
    got = np.concatenate([ours.logits(ours.chunk(0, i, [t])) for i, t in enumerate(ids)])
    assert divergence(want, got) < 1e-5
    assert np.abs(want - got).max() < 2e-2 * want.std()


@pytest.mark.parametrize("format", FORMATS, ids=lambda chosen: chosen.name)
@pytest.mark.parametrize("columns", [(72, 88), (96, 160), (256, 512)], ids=["odd", "32s", "64s"])
def test_every_format(
    isa: Any,
    format: Format,
    columns: tuple[int, int],
    models: Any,
    tiny: Callable[..., Any],
    drive: Callable[..., Any],
    tokens: Callable[..., Any],
) -> None:
    hidden, fed = columns
    if format in (Q8_0, Q4_1) and hidden % 32:
        hidden, fed = 64, 96  # ggml's formats have whole blocks of 32
    spec = models(hidden, fed)
    made = tiny(spec, format)
    ids = tokens(40)
    theirs, ours = drive(spec, made.reference()), drive(spec, made.native(isa))
    ours.open(0, ids)
    want = theirs.reference_logits(0, ids)
    got = np.concatenate([ours.logits(ours.chunk(0, i, [t])) for i, t in enumerate(ids)])
    assert divergence(want, got) < 1e-5
    assert np.abs(want - got).max() < 2e-2 * want.std()


def test_a_changed_spec_changes_the_logits(
    isa: Any, models: Any, tiny: Callable[..., Any], drive: Callable[..., Any], tokens: Callable[..., Any]
) -> None:
    """The bound of the tests above is tight enough to see a single wrong flag."""
    made = tiny(models(72, 88))
    ids = tokens(40)
    ours = drive(made.spec, made.native(isa))
    other = tiny(models(72, 88, scale=0.21))
    changed = drive(other.spec, other.native(isa))
    ours.open(0, ids)
    changed.open(0, ids)
    want, got = ours.logits(ours.chunk(0, 0, ids)), changed.logits(changed.chunk(0, 0, ids))
    assert divergence(want, got) > 1e-4
