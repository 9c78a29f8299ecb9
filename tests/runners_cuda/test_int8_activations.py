"""Prefill with int8 activations: how they are rounded, their products with int8 weights, and a model's chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from octavo.errors import IncompatibleModelError
from octavo.models.spec import DenseMLP
from octavo.quant.affine import INT8, Q4_1, Q8_0
from octavo.quant.format import Format
from octavo.runners.base import Batch
from octavo.runners.cuda import chunk, one_scale, rounded
from octavo.runners.cuda.device_model import DeviceNorm
from octavo.runners.cuda.feed_forward import feed_forward
from octavo.runners.cuda.int8_linear import Int8Tile, int8_linear
from octavo.runners.cuda.layout import CUDA_B64
from octavo.runners.cuda.norm import join_residual
from octavo.runners.cuda.runner import CudaRunner
from octavo.settings import ActivationsName

TOKENS, WIDTH, PADDED = 3, 160, 192


def poisoned(block: int, device: torch.device) -> rounded.Rounded:
    out = rounded.Rounded.empty(TOKENS, PADDED, block, device)
    out.values.fill_(99)
    out.scales.fill_(torch.nan)
    return out


def close(got: torch.Tensor, want: torch.Tensor, bound: float) -> None:
    assert float((got.float() - want).norm() / want.norm()) < bound


@pytest.mark.parametrize("block", [64, 128, PADDED])
def test_every_producer_rounds_as_the_reference(block: int, device: torch.device, randn: Any) -> None:
    h, gate_and_up, x = randn(TOKENS, WIDTH), randn(TOKENS, 2 * WIDTH), randn(TOKENS, PADDED)
    h[0, 3] = 300.0
    norm = DeviceNorm("rms", 1e-5, randn(WIDTH), None)
    normed = F.rms_norm(h, (WIDTH,), norm.gain, norm.eps)
    fed = F.silu(gate_and_up[:, :WIDTH]) * gate_and_up[:, WIDTH:]
    outs = [poisoned(block, device) for _ in range(3)]
    join_residual(h, None, outs[0], post=None, pre=norm, multiplier=1.0, pdl=False)
    feed_forward(gate_and_up, outs[1], DenseMLP(WIDTH, "silu"), pdl=False)
    rounded.round_values(x, outs[2])
    for out, values in zip(outs, (normed, fed, x), strict=True):
        padded = F.pad(values, (0, PADDED - values.shape[1]))
        want = rounded.reference(padded, block)
        assert torch.allclose(out.scales, want.scales, rtol=1e-5, atol=1e-30)
        error = (rounded.dequantized(out) - padded).abs()
        assert bool((error <= want.scales.T.repeat_interleave(block, 1)[:, :PADDED] * 0.501).all())


def test_what_is_not_a_number_does_not_become_one(device: torch.device, randn: Any) -> None:
    x = randn(TOKENS, PADDED)
    x[1, 5] = torch.nan
    out = poisoned(64, device)
    rounded.round_values(x, out)
    assert not bool(rounded.dequantized(out)[1, :64].isfinite().any())
    assert bool(rounded.dequantized(out)[[0, 2]].isfinite().all())


@pytest.mark.parametrize("format", [INT8, Q8_0], ids=lambda chosen: chosen.name)
def test_groups_become_one_scale_a_row(format: Format, pack: Callable[..., Any]) -> None:
    matrix, values = pack(format, 7, WIDTH)
    codes = torch.full((4, PADDED), 99, dtype=torch.int8, device=values.device)
    scales = torch.full((4,), torch.nan, device=values.device)
    one_scale.one_scale(matrix, 2, 6, codes, scales)
    want, want_scales = one_scale.reference(values[2:6])
    assert torch.allclose(scales, want_scales, rtol=1e-6)
    assert int((codes.int() - want.int()).abs().max()) <= 1  # of what lies between two codes
    assert float((codes != want).float().mean()) < 0.01


@pytest.mark.parametrize("block", [64, 128, PADDED])
def test_products_are_exact_but_for_the_rounding(block: int, randn: Any) -> None:
    rows, tokens = 21, 19  # neither fills its tile
    values, bias = randn(rows, PADDED), randn(rows)
    x = rounded.reference(randn(tokens, PADDED), block)
    codes, scales = one_scale.reference(values)
    want = rounded.dequantized(x).double() @ (codes * scales[:, None]).double().T + bias
    for tile in (Int8Tile(16, 16, 64, 2, 4), Int8Tile(16, 32, 128, 2, 4)):
        wide = torch.full((tokens, rows + 5), torch.nan, device=x.values.device)
        int8_linear(codes, scales, bias, x, wide[:, 2 : 2 + rows], tile, descriptors=False)
        close(wide[:, 2 : 2 + rows], want, 1e-6)
        assert bool(wide[:, :2].isnan().all())
        assert bool(wide[:, 2 + rows :].isnan().all())


def test_a_prompt_is_close_and_few_rows_are_left_alone(
    tiny_models: ModuleType, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk, "FEW_ROWS", 4)
    attention = tiny_models.attention(heads=2, kv_heads=1, head_dim=16, rope=tiny_models.rope(8))
    layer = tiny_models.layer(attention, DenseMLP(96, "silu"))
    spec = tiny_models.model(layer, hidden_size=64, vocab_size=64)
    made = tiny_models.make_tiny(spec, INT8)
    ids = tiny_models.prompt(6, vocabulary=spec.vocab_size)
    config = replace(
        tiny_models.runner_config(spec),
        device="cuda:0" if device.type == "cuda" else "cpu",
        compute_dtype="float16",
        kv_dtype="float16",
        threads=None,
    )
    want = tiny_models.Driver(spec, made.reference()).reference_logits(0, ids)[-1]

    def logits(activations: ActivationsName, tokens: int) -> Any:
        runner = CudaRunner(spec, made.open(CUDA_B64), config, activations=activations)
        drive = tiny_models.Driver(spec, runner)
        drive.open(0, ids)
        for first in range(0, len(ids), tokens):
            runner.forward(Batch((drive.chunk(0, first, ids[first : first + tokens]),)))
        found = runner.logits(0)
        runner.close()
        return found

    exact, fast, few = logits("int16", 6), logits("int8", 6), logits("int16", 3)
    for found in (exact, few):
        assert np.linalg.norm(found - want) < 0.01 * np.linalg.norm(want)
    assert np.linalg.norm(fast - want) < 0.06 * np.linalg.norm(want)
    assert not np.array_equal(fast, exact)
    assert np.array_equal(logits("int8", 3), few)


def test_an_int8_head_over_other_layers_is_no_int8_model(
    tiny_models: ModuleType, device: torch.device
) -> None:
    attention = tiny_models.attention(heads=2, kv_heads=1, head_dim=16, rope=tiny_models.rope(8))
    spec = tiny_models.model(
        tiny_models.layer(attention, DenseMLP(96, "silu")), hidden_size=64, vocab_size=64
    )
    made = tiny_models.make_tiny(spec, Q4_1)
    ends = (each.name for each in made.parameters if not each.name.startswith("layers."))
    made.formats.update({name: INT8 for name in ends if made.formats[name] == Q4_1})
    config = replace(
        tiny_models.runner_config(spec),
        device="cuda:0" if device.type == "cuda" else "cpu",
        compute_dtype="float16",
        kv_dtype="float16",
        threads=None,
    )
    with pytest.raises(IncompatibleModelError, match="no layer of this model has int8 weights"):
        CudaRunner(spec, made.open(CUDA_B64), config, activations="int8")
    CudaRunner(spec, made.open(CUDA_B64), config).close()
