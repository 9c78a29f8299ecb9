"""Fixed-point activation rows times an int8 matrix: the linear of a decode batch, without converting a weight.

The two bytes of an activation are two rows of one int8 product: rows 2 m and 2 m + 1 of the planes meet a tile of
weights in the tensor cores, and 256 high + low is exact. Where scales belong to blocks of columns, each block's sum is
multiplied in 32 bits; where both sides have one for all columns, integers are summed to the end. Weights are the wide
side of the product, since rows of x are few. Both come through tensor descriptors where the card has them; a CTA asks
for its first weights before it waits for the kernel before. The columns may be split over CTAs: partial sums lie in
`out`, and who reads it adds them in order.

Contract: planes int8 [M, 2, C] and scales fp32 [M, C / BK] or [M, 1] (`fixed_point`), the matrix [N, C] of layout
`cuda-b64-1` in codec i8 -> out fp32 [S, M, N], which may be columns of a wider one (+ bias, in split 0).
LOGITS: multiplier and softcap, and the best token of each BN rows. Shape letters: M rows of x, N output rows,
C padded columns, S splits; BM, BN, BK of each at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.runners.cuda.activation import tanh
from octavo.runners.cuda.device_model import Matrix
from octavo.runners.cuda.fixed_point import Planes
from octavo.runners.cuda.ptx import prefetch_l2, release_dependents, wait_for_inputs


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
    """Sums of high and of low bytes int32 [BN, 2 BM] -> fp32 [BN, BM]."""
    high, low = tl.split(tl.reshape(part, (BN, BM, 2)))
    return (high * 256 + low).to(tl.float32)


@triton.jit(do_not_specialize=["M", "N", "blocks", "splits", "stride", "split_stride"])
def planes_linear_kernel(
    weights, planes, codes, x_scales, scales, bias, out, best, best_ids, M, N, blocks, splits, stride, split_stride,
    multiplier, softcap, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr,
    GROUP: tl.constexpr, X_GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr, LINES: tl.constexpr,
    BIAS: tl.constexpr, LOGITS: tl.constexpr, SOFTCAP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (ceil(M / BM) S, ceil(N / BN)). `blocks` is C / 64; GROUP is a multiple of BK, or 0, X_GROUP is BK,
    or 0. `weights` and `planes` are descriptors of [BN, BK] and [2 BM, BK] of them, or pointers."""
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
    row = tile_n * BN + tl.arange(0, BN)
    token = tile_m * BM + tl.arange(0, BM)
    plane = tile_m * (2 * BM) + tl.arange(0, 2 * BM)
    inside = row < N
    present = token < M
    if LINES > 0:
        line = first * (UNROLL * BK) + tl.arange(0, LINES)[None, :] * 128
        line = tl.minimum(row, N - 1)[:, None].to(tl.int64) * C + tl.minimum(line, C - 1)
        prefetch_l2(codes.to(tl.int64) + line)
    factors = _block_scales(scales, row, inside, first, last, C, BK, GROUP, UNROLL)
    wait_for_inputs(PDL)
    x_factors = _block_scales(x_scales, token, present, first, last, C, BK, X_GROUP, UNROLL)
    total = tl.zeros((BN, BM), tl.float32)
    whole = tl.zeros((BN, 2 * BM), tl.int32)
    for at in tl.range(first, last):
        next_factors = _block_scales(scales, row, inside, at + 1, last, C, BK, GROUP, UNROLL)
        next_x_factors = _block_scales(x_scales, token, present, at + 1, last, C, BK, X_GROUP, UNROLL)
        for block in tl.static_range(UNROLL):
            column = (at * UNROLL + block) * BK
            if DESCRIPTORS:
                code = weights.load([tile_n * BN, column])
                x = planes.load([tile_m * (2 * BM), column])
            else:
                place = column + tl.arange(0, BK)[None, :]
                wanted = inside[:, None] & (place < C)
                code = tl.load(weights + row[:, None].to(tl.int64) * C + place, mask=wanted, other=0)
                x = tl.load(
                    planes + plane[:, None] * C + place, mask=(plane < 2 * M)[:, None] & (place < C), other=0
                )
            if GROUP > 0 or X_GROUP > 0:
                value = _joined(tl.dot(code, x.T, out_dtype=tl.int32), BN, BM)
                if X_GROUP > 0:
                    value = value * x_factors[block][None, :]
                if GROUP > 0:
                    value = value * factors[block][:, None]
                total += value
            else:
                whole = tl.dot(code, x.T, whole, out_dtype=tl.int32)
        factors = next_factors
        x_factors = next_x_factors
    if GROUP == 0 and X_GROUP == 0:
        total = _joined(whole, BN, BM)
    if X_GROUP == 0:
        total = total * tl.load(x_scales + token, mask=present, other=0.0)[None, :]
    if GROUP == 0:
        total = total * tl.load(scales + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    if BIAS:
        total += tl.load(bias + row, mask=inside & (split == 0), other=0.0)[:, None]
    if LOGITS:
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


def planes_linear(
    matrix: Matrix,
    x: Planes,
    out: torch.Tensor,
    tile: PlanesTile,
    *,
    pdl: bool,
    descriptors: bool,
    logits: RowLogits | None = None,
) -> None:
    """Launch it: x of M tokens, in blocks of 32 or 64 columns that divide the matrix's groups or with a scale for all
    -> `out` fp32 [S, M, N], rows contiguous."""
    splits, count, _ = out.shape
    group = matrix.encoding.group_size
    whole_rows = x.scales.shape[1] == 1
    block = (min(group, 64) or tile.columns) if whole_rows else x.block_columns
    assert matrix.encoding.codec == "i8"
    assert group % block == 0
    assert splits == tile.splits
    assert logits is None or splits == 1
    height = min(tile.tokens, max(8, triton.next_power_of_2(count)))
    codes = matrix.elements.view(matrix.rows, matrix.columns)
    pairs = x.pairs.view(2 * count, matrix.columns)
    unused = out
    planes_linear_kernel[(triton.cdiv(count, height) * splits, triton.cdiv(matrix.rows, tile.rows))](
        TensorDescriptor.from_tensor(codes, [tile.rows, block]) if descriptors else codes,
        TensorDescriptor.from_tensor(pairs, [2 * height, block]) if descriptors else pairs,
        codes,
        x.scales,
        matrix.scales,
        unused if matrix.bias is None else matrix.bias,
        out,
        unused if logits is None else logits.best,
        unused if logits is None else logits.best_ids,
        count,
        matrix.rows,
        matrix.columns // 64,
        splits,
        out.stride(1),
        out.stride(0),
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
        LOGITS=logits is not None,
        SOFTCAP=logits is not None and logits.softcap is not None,
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
