"""Divergence and layer errors against transformers on the same weights, by the formulas written out."""

from __future__ import annotations

import math

import pytest
import torch

from octavo.evaluate.divergence import divergences
from octavo.evaluate.logits import BLOCK_TOKENS, SegmentLogits
from octavo.models import build_model
from octavo.quant.logical_layout import REF1
from octavo.sources.resolve import resolve
from octavo.weights import choose_formats, open_weights

SEGMENTS = [[(7 * i + j) % 96 for i in range(BLOCK_TOKENS + 9)] for j in range(2)]


def segment_model(folder, quant):
    source = resolve(str(folder))
    spec, parameters = build_model(source.config, source.naming)
    weights = open_weights(
        model=source.location,
        fingerprint=source.fingerprint,
        tensors=source.tensors,
        parameters=parameters,
        formats=choose_formats(parameters, source.tensors, quant),
        layout=REF1,
        cache_dir=None,
        use_cache=False,
    )
    return SegmentLogits(spec, weights, 128)


def test_hidden_states_and_logits_are_those_of_transformers(tiny):
    folder, theirs = tiny
    forward = segment_model(folder, "none")(SEGMENTS[0])
    with torch.inference_mode():
        expected = theirs(torch.tensor([SEGMENTS[0]]), output_hidden_states=True)
    blocks = list(forward.logits())
    assert [len(block) for block in blocks] == [BLOCK_TOKENS, 9]
    torch.testing.assert_close(torch.cat(blocks), expected.logits[0], rtol=1e-4, atol=1e-5)
    assert len(forward.layers) == 3
    # transformers' list begins with the embedding, and ends with what the final norm made.
    for ours, hidden in zip(forward.layers[:2], expected.hidden_states[1:3], strict=True):
        torch.testing.assert_close(ours, hidden[0], rtol=1e-4, atol=1e-5)


def test_by_the_formulas(tiny):
    folder, _ = tiny
    truth, other = segment_model(folder, "none"), segment_model(folder, "int8")
    ticks = []
    found = divergences(truth, {"int8": other, "none": truth}, SEGMENTS, lambda: ticks.append(1))
    assert len(ticks) == 3 * len(SEGMENTS)
    kls, hits, difference, size = [], 0, 0.0, 0.0
    for segment in SEGMENTS:
        p = torch.cat(list(truth(segment).logits())).double().softmax(-1)
        q = torch.cat(list(other(segment).logits())).double().softmax(-1)
        kls += (p * (p / q).log()).sum(-1).tolist()
        hits += int((p.argmax(-1) == q.argmax(-1)).sum())
        wanted, got = truth(segment).layers[1].double(), other(segment).layers[1].double()
        difference += float(((got - wanted) ** 2).sum())
        size += float((wanted**2).sum())
    int8 = found["int8"]
    assert int8.kl_nats == pytest.approx(sum(kls) / len(kls), rel=1e-6)
    assert int8.top1_agreement == hits / len(kls)
    assert int8.layer_errors[1] == pytest.approx(math.sqrt(difference / size), rel=1e-6)
    assert int8.tokens == len(kls) == 2 * (BLOCK_TOKENS + 9)
    assert 0 < int8.kl_nats < 0.01
    assert int8.token_kls == pytest.approx(kls, rel=1e-4, abs=1e-9)
    assert int8.kl_beyond(found["none"]) == int8.kl
    assert found["none"].kl_beyond(int8).mean == -int8.kl_nats


def test_a_model_is_at_no_distance_from_itself(tiny):
    folder, _ = tiny
    truth = segment_model(folder, "none")
    found = divergences(truth, {"same": truth}, SEGMENTS)["same"]
    assert (found.kl_nats, found.top1_agreement, found.layer_errors) == (0, 1, (0, 0, 0))
