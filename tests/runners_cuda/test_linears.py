"""Products with packed matrices: batch 1, several rows, and dequantized, for every format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from octavo.models.spec import DenseMLP
from octavo.quant.affine import INT4, INT8, LLM_INT8, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_1, Q6_K, Q8_0, Affine
from octavo.quant.codebook import IQ4_NL, IQ4_XS, NF4, Codebook
from octavo.quant.format import Format
from octavo.quant.plain import Plain
from octavo.runners.cuda import fixed_point
from octavo.runners.cuda.dequantize import dequantize
from octavo.runners.cuda.embedding import embed
from octavo.runners.cuda.feed_forward import feed_forward
from octavo.runners.cuda.gemv import BLOCK_COLUMNS, Add, Logits, Vector, gemv, reference, shuffle
from octavo.runners.cuda.planes_linear import Gate, PlanesTile, RowLogits, planes_linear
from octavo.runners.cuda.planes_linear import reference as planes_reference
from octavo.runners.cuda.quantize_rows import Unquantized, quantize_rows
from octavo.runners.cuda.rows_linear import RowsTile, rows_linear
from octavo.runners.cuda.tiles import Tile

GPTQ = Affine("gptq-4-g128", 4, 128, "integer", "f16", "step", None)
FORMATS: tuple[Format, ...] = (
    *(INT8, LLM_INT8, Q8_0, Q5_1, Q6_K),
    *(INT4, Q2_K, Q3_K, Q4_K, Q4_1, Q4_0, GPTQ),
    *(
        Affine("w4-g64", 4, 64, "minimum", "f16", "step", None),
        Affine("w4", 4, None, "none", "f32", "step", None),
    ),
    *(Affine("w4-rows", 4, None, "integer", "f16", "step", None),),
    *(NF4, Codebook("fp4", "fp4", 64, "f32", None), IQ4_NL, IQ4_XS),
    *(Codebook("fp8", "e4m3", None, "f32", None), Codebook("fp8-g128", "e4m3", 128, "f32", None)),
    *(Plain("f32"), Plain("f16"), Plain("bf16")),
)
by_name = pytest.mark.parametrize("format", FORMATS, ids=lambda chosen: chosen.name)


def close(got: torch.Tensor, want: torch.Tensor, bound: float) -> None:
    assert float((got.float() - want).norm() / want.norm()) < bound


def vectors(x: torch.Tensor, plain: bool) -> list[Vector]:
    if plain:
        return [Vector("values", x)]
    planes = fixed_point.reference(x[None], 32)
    high, low = planes.pairs[0]
    return [Vector("planes", high, low, planes.scales), Vector("shuffled", shuffle(x))]


@by_name
def test_gemv_of_each_format_and_input_form(format: Format, pack: Callable[..., Any], randn: Any) -> None:
    rows, columns = 13, 96  # neither fills its tile
    matrix, values = pack(format, rows, columns, randn(rows))
    x = F.pad(randn(columns), (0, 32))
    want = reference(x, values, matrix.bias)
    for vector in vectors(x, matrix.encoding.takes_values):
        out = torch.full((rows,), torch.nan, device=x.device)
        gemv(matrix, vector, out, Tile(16, 8, 1, 1), multiprocessors=1, pdl=False)
        close(out, want, 2e-4)


def test_gemv_in_several_steps_and_ctas_is_the_same(pack: Callable[..., Any], randn: Any) -> None:
    matrix, values = pack(INT8, 12, 320)
    x = randn(320)
    (planes, _) = vectors(x, plain=False)
    for tile in (Tile(16, 4, 1, 1), Tile(4, 4, 1, 3)):
        out = torch.full((12,), torch.nan, device=x.device)
        gemv(matrix, planes, out, tile, multiprocessors=1, pdl=False)
        close(out, reference(x, values, None), 2e-4)


@pytest.mark.parametrize("format", [INT8, INT4, NF4], ids=lambda chosen: chosen.name)
def test_a_norm_in_front_and_a_sum_behind(format: Format, pack: Callable[..., Any], randn: Any) -> None:
    rows, columns = 20, 96
    matrix, values = pack(format, rows, columns, randn(rows))
    h, gain, stream = randn(columns), 1 + 0.2 * randn(columns), randn(32)
    normed = F.pad(F.rms_norm(h, (columns,), gain, 1e-3), (0, 32))
    x = Vector("normed", shuffle(F.pad(h, (0, 32))), None, shuffle(F.pad(gain, (0, 32))), columns, 1e-3)
    out = shuffle(stream)
    gemv(
        matrix,
        x,
        out,
        Tile(4, 8, 1, 2),
        multiprocessors=1,
        pdl=False,
        epilogue=Add(0.5),
        shuffled=True,
    )
    want = stream[:rows] + 0.5 * reference(normed, values, matrix.bias)
    close(shuffle(out)[:rows], want, 2e-4)
    assert torch.equal(shuffle(out)[rows:], stream[rows:])


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gate_and_up(activation: str, pack: Callable[..., Any], randn: Any) -> None:
    matrix, values = pack(INT8, 2 * 21, 64)
    x = randn(64)
    gate, up = reference(x, values, None).chunk(2)
    act = (
        F.silu(gate)
        if activation == "silu"
        else F.gelu(gate, approximate="tanh" if "tanh" in activation else "none")
    )
    want = F.pad(act * up, (0, 64 - 21))
    (planes, _) = vectors(x, plain=False)
    out = torch.zeros(64, device=x.device)
    tile = Tile(4, 8, 1, 2)
    gemv(
        matrix,
        planes,
        out,
        tile,
        multiprocessors=1,
        pdl=False,
        epilogue="gate",
        activation=activation,
        shuffled=True,
    )
    close(shuffle(out), want, 2e-4)
    gate_up = torch.cat((gate, up))[None]
    many = torch.zeros((1, 64), device=x.device)
    feed_forward(gate_up, many, DenseMLP(21, activation), shuffled=False, pdl=False)  # type: ignore[arg-type]
    close(many[0], want, 1e-5)
    many.zero_()
    feed_forward(gate_up, many, DenseMLP(21, activation), shuffled=True, pdl=False)  # type: ignore[arg-type]
    close(shuffle(many[0]), want, 1e-5)


@pytest.mark.parametrize("gated", [True, False], ids=["gate", "activate"])
def test_results_left_in_planes(gated: bool, pack: Callable[..., Any], randn: Any) -> None:
    results, columns = 37, 64  # a block of 32 and a part of one
    matrix, values = pack(INT8, 2 * results if gated else results, columns)
    x = randn(columns)
    (vector, _) = vectors(x, plain=False)
    y = reference(x, values, None)
    gate, up = y.chunk(2) if gated else (y, torch.ones_like(y))
    want = fixed_point.reference(F.pad(F.silu(gate) * up, (0, columns - results))[None], BLOCK_COLUMNS)
    pairs = torch.zeros((1, 2, columns), dtype=torch.int8, device=x.device)
    planes = fixed_point.Planes(pairs, torch.zeros((1, columns // BLOCK_COLUMNS), device=x.device))
    gemv(
        matrix,
        vector,
        planes,
        Tile(4, 16, 1, 1),
        multiprocessors=2,
        pdl=False,
        epilogue="gate" if gated else "activate",
    )
    close(fixed_point.dequantize(planes), fixed_point.dequantize(want), 2e-4)
    close(planes.scales, want.scales, 2e-4)


def test_the_head_finds_its_best_token_and_sees_what_is_not_finite(
    pack: Callable[..., Any], randn: Any
) -> None:
    matrix, values = pack(INT8, 30, 64)
    x = randn(64)
    (planes, _) = vectors(x, plain=False)
    want = 2.0 * torch.tanh(reference(x, values, None) * 0.5 / 2.0)
    out, best = torch.zeros(30, device=x.device), torch.zeros(2, device=x.device)
    best_ids = torch.zeros(2, dtype=torch.int32, device=x.device)
    head = Logits(0.5, 2.0, best, best_ids)
    gemv(matrix, planes, out, Tile(4, 8, 1, 2), multiprocessors=1, pdl=False, epilogue=head)
    close(out, want, 2e-4)
    assert int(best_ids[best.argmax()]) == int(out.argmax())
    assert planes.scales is not None
    broken = Vector("planes", planes.x, planes.low, planes.scales * torch.nan)
    gemv(
        matrix,
        broken,
        out,
        Tile(4, 8, 1, 2),
        multiprocessors=1,
        pdl=False,
        epilogue=Logits(1, None, best, best_ids),
    )
    assert bool(best.isinf().all())


@by_name
def test_rows_and_dequantized_products(format: Format, pack: Callable[..., Any], randn: Any) -> None:
    rows, columns = 20, 160  # padded to a step and a half
    matrix, values = pack(format, rows, columns, randn(rows))
    dense = torch.full((rows, matrix.columns), torch.nan, device=values.device)
    dequantize(matrix, 0, rows, dense)
    exact = format is not LLM_INT8  # its 127th is in the scale
    assert torch.allclose(dense[:, :columns], values[:, :columns], rtol=0 if exact else 2e-7, atol=0)
    part = torch.empty((4, matrix.columns), device=values.device)
    dequantize(matrix, 7, 11, part)
    assert torch.equal(part, dense[7:11])
    x = F.pad(randn(3, columns), (0, 32)).half()
    out = torch.full((3, rows + 2), torch.nan, device=values.device)
    rows_linear(matrix, x, out[:, 1:-1])
    close(out[:, 1:-1], x.float() @ values.T + matrix.bias, 2e-3)
    assert bool(out[:, [0, -1]].isnan().all())
    rows_linear(matrix, x, out[:, 1:-1], RowsTile(16, 2, 2, columns=128))
    close(out[:, 1:-1], x.float() @ values.T + matrix.bias, 2e-3)
    parts = torch.full((2, 3, rows), torch.nan, device=values.device)
    rows_linear(matrix, x, parts, RowsTile(16, 2, 2, 2))
    close(parts.sum(0), x.float() @ values.T + matrix.bias, 2e-3)


@pytest.mark.parametrize("format", [INT8, LLM_INT8, Q8_0], ids=lambda chosen: chosen.name)
@pytest.mark.parametrize(
    ("tile", "count", "blocks"),
    [
        (PlanesTile(16, 32, 64, 2, 4), 3, True),
        (PlanesTile(16, 8, 128, 2, 4, 2), 9, False),
        (PlanesTile(32, 32, 256, 2, 4, 3), 5, True),
    ],
)
def test_rows_in_fixed_point(
    format: Format, tile: PlanesTile, count: int, blocks: bool, pack: Callable[..., Any], randn: Any
) -> None:
    rows, columns = 20, 320 - 32  # no tile, step or split is filled
    matrix, values = pack(format, rows, columns, randn(rows))
    block = (matrix.encoding.group_size or 64) if blocks else matrix.columns
    x = fixed_point.reference(F.pad(randn(count, columns), (0, 32)), block)
    out = torch.full((tile.splits, count, rows + 2), torch.nan, device=values.device)
    planes_linear(matrix, x, out[:, :, 1:-1], tile, pdl=False, descriptors=tile.splits == 2)
    close(out[:, :, 1:-1].sum(0), planes_reference(x, values, matrix.bias), 1e-6)
    assert bool(out[..., [0, -1]].isnan().all())


def test_sums_of_all_columns_fit(pack: Callable[..., Any], device: torch.device) -> None:
    """One scale a row and one a token: 256 times the sum of high bytes is beyond 32 bits from 520 columns on."""
    matrix, _ = pack(LLM_INT8, 4, 1024)
    matrix.codes.view(torch.int8).fill_(127)
    matrix.scales.fill_(0.5)
    x = fixed_point.reference(torch.ones((3, 1024), device=device), matrix.columns)
    out = torch.zeros((1, 3, 4), device=device)
    planes_linear(matrix, x, out, PlanesTile(16, 8, 128, 2, 4), pdl=False, descriptors=False)
    close(out[0], torch.full((3, 4), 0.5 * 127 * 1024, device=device), 1e-4)


@pytest.mark.parametrize("format", [INT8, LLM_INT8, Q8_0], ids=lambda chosen: chosen.name)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate_and_up_of_rows_in_fixed_point(
    format: Format, activation: str, pack: Callable[..., Any], randn: Any
) -> None:
    """33 hidden columns: neither a tile nor a block of the planes is filled, the rest is zeros."""
    fed, columns, count = 33, 96, 5
    matrix, values = pack(format, 2 * fed, columns, randn(2 * fed))
    block = matrix.encoding.group_size or matrix.columns
    x = fixed_point.reference(F.pad(randn(count, columns), (0, 32)), block)
    planes = fixed_point.Planes(
        torch.full((count, 2, 64), 77, dtype=torch.int8, device=values.device),
        torch.full((count, 64 // (matrix.encoding.group_size or 64)), torch.nan, device=values.device),
    )
    tile = PlanesTile(64, 32, 64, 2, 4)
    planes_linear(matrix, x, Gate(activation, planes), tile, pdl=False, descriptors=activation == "silu")
    gate, up = planes_reference(x, values, matrix.bias).chunk(2, -1)
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    close(fixed_point.dequantize(planes), F.pad(act * up, (0, 64 - fed)), 5e-5)
    assert bool((planes.pairs[..., fed:] == 0).all())


def test_gate_and_up_leave_values_where_a_scale_is_a_token_s(pack: Callable[..., Any], randn: Any) -> None:
    """Two pieces, the second not filled; what is not a number stays none."""
    fed, columns, count = 33, 96, 5
    matrix, values = pack(INT8, 2 * fed, columns, randn(2 * fed))
    x = fixed_point.reference(F.pad(randn(count, columns), (0, 32)), 128)
    x.scales[3] = torch.nan
    gated = Unquantized(
        torch.full((count, fed), torch.nan, device=values.device),
        torch.zeros((count, 2), device=values.device),
    )
    planes_linear(matrix, x, Gate("silu", gated), PlanesTile(32, 8, 64, 2, 4), pdl=False, descriptors=False)
    gate, up = planes_reference(x, values, matrix.bias).chunk(2, -1)
    want, sound = F.pad(F.silu(gate) * up, (0, 64 - fed)), torch.tensor([0, 1, 2, 4])
    close(gated.values[sound], want[sound, :fed], 1e-5)
    planes = fixed_point.Planes(
        torch.full((count, 2, 64), 77, dtype=torch.int8, device=values.device),
        torch.full((count, 1), torch.nan, device=values.device),
    )
    quantize_rows(gated, planes, pdl=False)
    close(fixed_point.dequantize(planes)[sound], want[sound], 5e-5)
    assert torch.allclose(planes.scales[sound, 0], want[sound].abs().amax(1) / fixed_point.LARGEST)
    assert not bool(planes.scales[3].isfinite().any())


def test_the_batch_head_finds_the_best_tokens_and_sees_what_is_not_finite(
    pack: Callable[..., Any], randn: Any
) -> None:
    matrix, values = pack(INT8, 37, 64)
    x = fixed_point.reference(randn(3, 64), 64)
    x.scales[1] = torch.nan
    want = 2.0 * torch.tanh(planes_reference(x, values, None) * 0.5 / 2.0)
    out = torch.zeros((1, 3, 37), device=values.device)
    best = torch.full((3, 3), torch.nan, device=values.device)
    best_ids = torch.zeros((3, 3), dtype=torch.int32, device=values.device)
    head = RowLogits(0.5, 2.0, best, best_ids)
    planes_linear(matrix, x, out, PlanesTile(16, 8, 64, 2, 4), pdl=False, descriptors=False, logits=head)
    close(out[0, [0, 2]], want[[0, 2]], 1e-5)
    assert bool(best[1].isinf().all())
    for token in (0, 2):
        assert int(best_ids[token][best[token].argmax()]) == int(out[0, token].argmax())


@pytest.mark.parametrize("format", [INT8, INT4, NF4, Plain("bf16")], ids=lambda chosen: chosen.name)
def test_embedding_by_id_and_by_slot(format: Format, pack: Callable[..., Any], device: torch.device) -> None:
    matrix, values = pack(format, 9, 96)
    ids = torch.tensor([3, 8, 0], dtype=torch.int32, device=device)
    h = torch.empty((3, 96), device=device)
    embed(matrix, ids, None, h, 2.0)
    assert torch.allclose(h, 2 * values[ids.long(), :96])
    slots = torch.tensor([2, 0, 1], dtype=torch.int32, device=device)
    embed(matrix, ids, slots, h, 1.0)
    assert torch.allclose(h, values[[0, 3, 8], :96])
    wide = torch.zeros((3, 128), device=device)
    embed(matrix, ids, slots, wide, 1.0, width=96, shuffled=True)
    assert torch.equal(shuffle(wide), F.pad(h, (0, 32)))
