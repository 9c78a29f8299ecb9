"""Fixed-point activation rows times an int8 matrix: the linear of a decode batch, without converting a weight.

The two bytes of an activation are two rows of one int8 product: rows 2 m and 2 m + 1 of the planes meet a tile of
weights in the tensor cores, and 256 high + low is exact. Where scales belong to blocks of columns, each block's sum is
multiplied in 32 bits; where both sides have one for all columns, integers are summed to the end. Weights are the wide
side of the product, since rows of x are few. Both come through tensor descriptors where the card has them; a CTA asks
for its first weights before it waits for the kernel before. The columns may be split over CTAs: partial sums lie in
`out`, and who reads it adds them in order.

Contract: planes int8 [M, 2, C] and scales fp32 [M, C / BK] or [M, 1] (`fixed_point`), the matrix [N, C] of layout
`cuda-b64-1` in codec i8 -> out fp32 [S, M, N], which may be columns of a wider one (+ bias, in split 0). Other
epilogues: `logits`: multiplier and softcap, and the best token of each BN rows; `gate`: rows n and n + N / 2 ->
act(gate) * up as planes [M, 2, columns], which have zeros past N / 2, a scale for each XB of them, or where the scale
is a token's (XB 0) as values [M, N / 2] and the largest of each BN of them. Shape letters: M rows of x, N output rows,
C padded columns, S splits; BM, BN, BK of each at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.runners.cuda.activation import activate, tanh
from octavo.runners.cuda.device_model import Matrix
from octavo.runners.cuda.fixed_point import Planes, magnitude, store_planes_of_rows
from octavo.runners.cuda.ptx import prefetch_l2, release_dependents, wait_for_inputs
from octavo.runners.cuda.quantize_rows import Unquantized


@triton.jit
def _block_scales(
    scales, row, wanted, at, last, columns, BK: tl.constexpr, GROUP: tl.constexpr, UNROLL: tl.constexpr
):  # fmt: skip
    """Scales fp32 [rows], GROUP columns each, of the UNROLL blocks of step `at`; nothing where GROUP is 0."""
    found = ()
    for block in tl.static_range(UNROLL):
        if GROUP > 0:
            column = (at * UNROLL + block) * BK
            groups = (columns + GROUP - 1) // GROUP
            mask = wanted & (at < last) & (column < columns)
            value = tl.load(scales + row * groups + column // GROUP, mask=mask, other=0.0)
            found = found + (value.to(tl.float32),)
        else:
            found = found + (0.0,)
    return found


@triton.jit
def _joined(part, BN: tl.constexpr, BM: tl.constexpr):
    """A block's sums of high and of low bytes int32 [BN, 2 BM] -> fp32 [BN, BM], exact before the conversion."""
    high, low = tl.split(tl.reshape(part, (BN, BM, 2)))
    return (high * 256 + low).to(tl.float32)


@triton.jit
def _load_tile(
    source, first, column, rows, columns, HEIGHT: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr
):  # fmt: skip
    """int8 [HEIGHT, BK] at row `first` of [rows, columns], zeros past its end."""
    if DESCRIPTORS:
        return source.load([first, column])
    else:
        row = first + tl.arange(0, HEIGHT)[:, None]
        place = column + tl.arange(0, BK)[None, :]
        return tl.load(
            source + row.to(tl.int64) * columns + place, mask=(row < rows) & (place < columns), other=0
        )


@triton.jit
def _add_block(
    total, whole, code, x, factor, x_factor,
    BN: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr, X_GROUP: tl.constexpr,
):  # fmt: skip
    """A block's product added to `total` fp32 [BN, BM], or where no scale is a block's own to `whole`."""
    if GROUP > 0 or X_GROUP > 0:
        value = _joined(tl.dot(code, x.T, out_dtype=tl.int32), BN, BM)
        if X_GROUP > 0:
            value = value * x_factor[None, :]
        if GROUP > 0:
            value = value * factor[:, None]
        total += value
    else:
        whole = tl.dot(code, x.T, whole, out_dtype=tl.int32)
    return total, whole


@triton.jit
def _finish(
    total, whole, x_scales, scales, bias, row, inside, token, present, adding,
    BN: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr, X_GROUP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """What scales remain, and the bias where `adding`."""
    if GROUP == 0 and X_GROUP == 0:
        # Of all columns: 256 times such a sum need not fit 32 bits.
        high, low = tl.split(tl.reshape(whole, (BN, BM, 2)))
        total = high.to(tl.float32) * 256.0 + low.to(tl.float32)
    if X_GROUP == 0:
        total = total * tl.load(x_scales + token, mask=present, other=0.0)[None, :]
    if GROUP == 0:
        total = total * tl.load(scales + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    if BIAS:
        total += tl.load(bias + row, mask=inside & adding, other=0.0)[:, None]
    return total


@triton.jit(do_not_specialize=["M", "N", "blocks", "splits", "stride", "split_stride"])
def planes_linear_kernel(
    weights, planes, codes, x_scales, scales, bias, out, best, best_ids, M, N, blocks, splits, stride, split_stride,
    multiplier, softcap, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr,
    GROUP: tl.constexpr, X_GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr, LINES: tl.constexpr,
    BIAS: tl.constexpr, EPILOGUE: tl.constexpr, SOFTCAP: tl.constexpr, ACTIVATION: tl.constexpr,
    XB: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (ceil(M / BM) S, ceil(N / BN)), or ceil(columns / BN) of a gate's planes.

    `blocks` is C / 64; GROUP is a multiple of BK, or 0, X_GROUP is BK, or 0. `weights` and `planes` are descriptors
    of [BN, BK] and [2 BM, BK] of them, or pointers.
    """
    release_dependents(PDL)
    tokens = (M + BM - 1) // BM
    tile_m = tl.program_id(0) % tokens
    split = tl.program_id(0) // tokens
    tile_n = tl.program_id(1)
    C = blocks * 64  # a multiple of 64, as the compiler sees
    steps = (C + UNROLL * BK - 1) // (UNROLL * BK)
    share = (steps + splits - 1) // splits
    first = split * share
    last = tl.minimum(first + share, steps)
    GATE: tl.constexpr = EPILOGUE == "gate"
    end = N // 2 if GATE else N
    row = tile_n * BN + tl.arange(0, BN)
    token = tile_m * BM + tl.arange(0, BM)
    inside = row < end
    present = token < M
    if LINES > 0:
        line = first * (UNROLL * BK) + tl.arange(0, LINES)[None, :] * 128
        line = tl.minimum(row, end - 1)[:, None].to(tl.int64) * C + tl.minimum(line, C - 1)
        prefetch_l2(codes.to(tl.int64) + line)
        if GATE:
            prefetch_l2(codes.to(tl.int64) + end.to(tl.int64) * C + line)
    factors = _block_scales(scales, row, inside, first, last, C, BK, GROUP, UNROLL)
    up_factors = factors
    if GATE:
        up_factors = _block_scales(scales, end + row, inside, first, last, C, BK, GROUP, UNROLL)
    wait_for_inputs(PDL)
    x_factors = _block_scales(x_scales, token, present, first, last, C, BK, X_GROUP, UNROLL)
    total = tl.zeros((BN, BM), tl.float32)
    whole = tl.zeros((BN, 2 * BM), tl.int32)
    up, up_whole = total, whole
    for at in tl.range(first, last):
        next_factors = _block_scales(scales, row, inside, at + 1, last, C, BK, GROUP, UNROLL)
        next_up_factors = up_factors
        if GATE:
            next_up_factors = _block_scales(scales, end + row, inside, at + 1, last, C, BK, GROUP, UNROLL)
        next_x_factors = _block_scales(x_scales, token, present, at + 1, last, C, BK, X_GROUP, UNROLL)
        for block in tl.static_range(UNROLL):
            column = (at * UNROLL + block) * BK
            code = _load_tile(weights, tile_n * BN, column, N, C, BN, BK, DESCRIPTORS)
            x = _load_tile(planes, tile_m * (2 * BM), column, 2 * M, C, 2 * BM, BK, DESCRIPTORS)
            total, whole = _add_block(
                total, whole, code, x, factors[block], x_factors[block], BN, BM, GROUP, X_GROUP
            )
            if GATE:
                code = _load_tile(weights, end + tile_n * BN, column, N, C, BN, BK, DESCRIPTORS)
                up, up_whole = _add_block(
                    up, up_whole, code, x, up_factors[block], x_factors[block], BN, BM, GROUP, X_GROUP
                )
        factors = next_factors
        up_factors = next_up_factors
        x_factors = next_x_factors
    total = _finish(
        total, whole, x_scales, scales, bias, row, inside, token, present, split == 0,
        BN, BM, GROUP, X_GROUP, BIAS,
    )  # fmt: skip
    if GATE:
        up = _finish(
            up, up_whole, x_scales, scales, bias, end + row, inside, token, present, split == 0,
            BN, BM, GROUP, X_GROUP, BIAS,
        )  # fmt: skip
        value = tl.where(inside[:, None], activate(total, ACTIVATION) * up, 0.0)
        if XB > 0:
            store_planes_of_rows(out, best, value, tile_n * BN, token, present, stride, BN, BM, XB)
        else:
            place = token[None, :].to(tl.int64) * stride + row[:, None]
            tl.store(out + place, value, mask=inside[:, None] & present[None, :])
            place = token * tl.num_programs(1) + tile_n
            tl.store(best + place, tl.max(magnitude(value), 0), mask=present)
    else:
        if EPILOGUE == "logits":
            total = total * multiplier
            if SOFTCAP:
                total = softcap * tanh(total / softcap)
            # A row that is not finite has to be seen: it wins as +inf.
            seen = tl.where(total == total, total, float("inf"))
            seen = tl.where(inside[:, None], seen, float("-inf"))
            most = tl.max(seen, 0)
            chosen = tl.min(tl.where(seen == most[None, :], row[:, None], 2147483647), 0)
            place = token * tl.num_programs(1) + tile_n
            tl.store(best + place, most, mask=present)
            tl.store(best_ids + place, chosen, mask=present)
        place = split.to(tl.int64) * split_stride + token[None, :].to(tl.int64) * stride + row[:, None]
        tl.store(out + place, total, mask=inside[:, None] & present[None, :])


@dataclass(frozen=True, slots=True)
class PlanesTile:
    """How a product is cut."""

    rows: int
    """Of the output in a CTA."""
    tokens: int
    """At most, in a CTA."""
    columns: int
    """Of a step."""
    stages: int
    """Steps on their way."""
    warps: int
    splits: int = 1
    """Shares of the columns."""
    early_bytes: int = 0
    """Of each row, asked for before the kernel before is done."""


@dataclass(frozen=True, slots=True)
class RowLogits:
    """What the head's epilogue does, and where it leaves the best token of each tile of rows."""

    multiplier: float
    softcap: float | None
    best: torch.Tensor
    """fp32 [M, ceil(V / rows of the tile)]."""
    best_ids: torch.Tensor
    """int32, like `best`."""


@dataclass(frozen=True, slots=True)
class Gate:
    """act(gate) * up instead of the rows of gate over up, as the next product takes it."""

    activation: str
    out: Planes | Unquantized
    """Planes in blocks of columns, not wider than the tile is high; or a piece for each tile."""


def planes_linear(
    matrix: Matrix,
    x: Planes,
    out: torch.Tensor | Gate,
    tile: PlanesTile,
    *,
    pdl: bool,
    descriptors: bool,
    logits: RowLogits | None = None,
) -> None:
    """Launch it: x of M tokens, in blocks of 32 or 64 columns that divide the matrix's groups or with a scale for all
    -> `out` fp32 [S, M, N], rows contiguous, or what a gate makes."""
    count = x.pairs.shape[0]
    group = matrix.encoding.group_size
    whole_rows = x.scales.shape[1] == 1
    of_weights = tile.columns if group == 0 else 64 if group % 64 == 0 else 32
    block = of_weights if whole_rows else x.block_columns
    assert matrix.encoding.codec == "i8"
    assert group % block == 0
    unused = x.scales
    best, best_ids = (unused, unused) if logits is None else (logits.best, logits.best_ids)
    gated_block = 0
    if isinstance(out, Gate):
        assert tile.splits == 1
        if isinstance(out.out, Planes):
            to, strides, width, best = out.out.pairs, (0, out.out.columns), out.out.columns, out.out.scales
            gated_block = out.out.block_columns
            assert tile.rows % gated_block == 0
        else:
            to, width, best = out.out.values, matrix.rows // 2, out.out.largest
            strides = 0, width
            assert best.shape[1] == triton.cdiv(width, tile.rows)
    else:
        to, strides, width = out, (out.stride(0), out.stride(1)), matrix.rows
        assert tile.splits == out.shape[0]
        assert logits is None or tile.splits == 1
    height = min(tile.tokens, max(8, triton.next_power_of_2(count)))
    codes = matrix.elements.view(matrix.rows, matrix.columns)
    pairs = x.pairs.view(2 * count, matrix.columns)
    planes_linear_kernel[(triton.cdiv(count, height) * tile.splits, triton.cdiv(width, tile.rows))](
        TensorDescriptor.from_tensor(codes, [tile.rows, block]) if descriptors else codes,
        TensorDescriptor.from_tensor(pairs, [2 * height, block]) if descriptors else pairs,
        codes,
        x.scales,
        matrix.scales,
        unused if matrix.bias is None else matrix.bias,
        to,
        best,
        best_ids,
        count,
        matrix.rows,
        matrix.columns // 64,
        tile.splits,
        strides[1],
        strides[0],
        1.0 if logits is None else logits.multiplier,
        1.0 if logits is None else logits.softcap or 1.0,
        BM=height,
        BN=tile.rows,
        BK=block,
        UNROLL=max(1, tile.columns // block),
        GROUP=group,
        X_GROUP=0 if whole_rows else block,
        DESCRIPTORS=descriptors,
        LINES=tile.early_bytes // 128 if pdl else 0,
        BIAS=matrix.bias is not None,
        EPILOGUE="gate" if isinstance(out, Gate) else "logits" if logits is not None else "store",
        SOFTCAP=logits is not None and logits.softcap is not None,
        ACTIVATION=out.activation if isinstance(out, Gate) else "silu",
        XB=gated_block,
        PDL=pdl,
        num_warps=tile.warps,
        num_stages=tile.stages,
        launch_pdl=pdl,
    )


def reference(x: Planes, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Planes of M tokens, the dequantized matrix fp32 [N, C] -> fp32 [M, N]."""
    values = x.pairs[:, 0].double() * 256 + x.pairs[:, 1].double()
    values = (values.unflatten(-1, (x.scales.shape[1], -1)) * x.scales[..., None].double()).flatten(1)
    y: torch.Tensor = values @ weight.double().T
    return (y if bias is None else y + bias.double()).float()
