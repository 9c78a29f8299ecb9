"""Steps of a batch give a sequence the logits that it gets as one chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from octavo.models.spec import Attention, DenseMLP, LayerNorms, LayerSpec, ModelSpec, Norm, Rope
from octavo.quant.affine import INT8, LLM_INT8, Q4_1
from octavo.quant.format import Format
from octavo.quant.plain import Plain
from octavo.runners.cuda import batch_decode
from octavo.runners.cuda.batch_decode import BatchStep
from octavo.runners.cuda.chunk import ChunkModel
from octavo.runners.cuda.decode import Card
from octavo.runners.cuda.decode_attention import Sequences
from octavo.runners.cuda.device_model import DeviceLayer, DeviceModel, DeviceNorm, Linear
from octavo.runners.cuda.kv_cache import make_cache

HIDDEN, HEADS, KV_HEADS, DIM, FED, VOCABULARY, CONTEXT = 96, 4, 2, 24, 160, 70, 64
RMS = Norm("rms", 1e-5)
CARD = Card("none", 4, False, 0)


@pytest.fixture
def model(pack: Callable[..., Any], randn: Any, device: torch.device) -> Callable[..., DeviceModel]:
    """(format of layers, format of the head) -> one layer with every norm, a window, and softcaps."""
    frequencies = torch.tensor([1.0, 0.3, 0.1, 0.03])
    rope = Rope("default", 1e4, 8, tuple(frequencies.tolist()))
    mixer = Attention(HEADS, KV_HEADS, DIM, 0.2, rope, window=9, softcap=5.0)
    layer = LayerSpec(
        LayerNorms(RMS, RMS, RMS, RMS), mixer, DenseMLP(FED, "gelu_tanh"), residual_multiplier=0.7
    )
    spec = ModelSpec("tiny", VOCABULARY, HIDDEN, (layer,), RMS, CONTEXT, False, final_softcap=8.0)
    spec = replace(spec, logits_multiplier=1.5)
    angles = torch.arange(CONTEXT)[:, None] * frequencies

    def norm() -> DeviceNorm:
        return DeviceNorm("rms", 1e-5, 1 + 0.1 * randn(HIDDEN), None)

    def make(format: Format, head: Format) -> DeviceModel:
        def linear(rows: int, columns: int, chosen: Format = format) -> Linear:
            return Linear((pack(chosen, rows, columns, 0.1 * randn(rows))[0],))

        device_layer = DeviceLayer(
            layer,
            qkv=linear((HEADS + 2 * KV_HEADS) * DIM, HIDDEN),
            o=linear(HIDDEN, HEADS * DIM),
            gate_up=linear(2 * FED, HIDDEN),
            down=linear(HIDDEN, FED),
            pre_mixer=norm(),
            post_mixer=norm(),
            pre_ffn=norm(),
            post_ffn=norm(),
            q_norm=None,
            k_norm=None,
            cosines=angles.cos().to(device),
            sines=angles.sin().to(device),
        )
        last = linear(VOCABULARY, HIDDEN, head)
        return DeviceModel(spec, last.parts[0], (device_layer,), norm(), last, 0)

    return make


@pytest.mark.parametrize(
    ("format", "head", "blocks_up_to"),
    [(INT8, INT8, 16), (INT8, INT8, 1), (Q4_1, INT8, 16), (LLM_INT8, Plain("f16"), 16)],
    ids=["int8", "int8, a scale a token", "q4_1 and int8", "llm-int8 and f16"],
)
def test_a_row_of_a_batch_gets_the_logits_of_a_chunk(
    format: Format,
    head: Format,
    blocks_up_to: int,
    model: Callable[..., DeviceModel],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch_decode, "BLOCKS_UP_TO", blocks_up_to)
    made = model(format, head)
    ints = {"dtype": torch.int32, "device": device}
    tokens, slot, spare = torch.tensor([5, 69], **ints), 0, 1
    caches = make_cache(made.spec, [5], torch.float16, device)
    chunks = ChunkModel(made, caches, torch.float16)
    want = torch.empty((2, VOCABULARY), device=device)
    chunks.logits(chunks.forward(tokens, 0, (torch.tensor([3, 4], **ints),)), want)

    positions, last = torch.zeros(2, **ints), torch.zeros(2, **ints)
    tables = torch.tensor([[0, 1], [2, 2]], **ints)
    sequences = Sequences(torch.full((2,), spare, **ints), positions, (tables,), spare)
    step = BatchStep(
        made, caches, sequences, last, context_tokens=CONTEXT, compute_dtype=torch.float16, card=CARD
    )
    step.set_slots((slot,))
    for at, token in enumerate(tokens.tolist()):
        last[slot] = token
        step.logits.fill_(torch.nan)
        step.forward()
        step.pick()
        assert float((step.logits[0] - want[at]).norm() / want[at].norm()) < 4e-3
        assert int(step.sampled[0]) == int(step.logits[0].argmax())
        assert positions.tolist() == [at + 1, 0]  # the row that only fills up stays where it is
    assert step.nbytes > 0
