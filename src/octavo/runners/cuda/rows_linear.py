"""Several activation vectors times a matrix: weights are dequantized in registers and go through tensor cores.

For decode batches that `planes_linear` does not take, where reading the weights is the cost; hundreds of rows go
through `dequantize` and a library's product. Weights are the wide side of the product (rows of x are few). The
columns may be split over CTAs, whose partial sums the reader adds in order.
Contract: x [M, C] in a 16-bit type, the matrix [N, C] of layout `cuda-b64-1` -> out [M, N] or the S partial sums
[S, M, N] (the bias in the first), which may be columns of a wider matrix.
Shape letters: M rows of x, N output rows, C padded columns, S splits; BM, BN, BK of each at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.runners.cuda.device_model import Matrix
from octavo.runners.cuda.limits import PARTIAL_SUMS
from octavo.runners.cuda.unpack import lane_columns, unpack_lanes, unpack_row


@triton.jit(do_not_specialize=["M", "N", "stride", "split_stride"])
def rows_linear_kernel(
    x, codes, scales, table, bias, out, M, N, stride, split_stride,
    C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CODEC: tl.constexpr,
    GROUP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Grid: (ceil(N / BN), ceil(M / BM), S)."""
    EIGHT_BITS: tl.constexpr = CODEC == "i8" or CODEC == "i8m" or CODEC == "e4m3"
    PLAIN: tl.constexpr = CODEC == "f16" or CODEC == "bf16" or CODEC == "f32"
    LANES: tl.constexpr = not EIGHT_BITS and not PLAIN and GROUP > 0 and GROUP % 32 == 0
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    inside = row[:, None] < N
    total = tl.zeros((BN, BM), tl.float32)
    split = tl.program_id(2)
    share = ((C + BK - 1) // BK + tl.num_programs(2) - 1) // tl.num_programs(2) * BK
    for first in tl.range(split * share, tl.minimum(split * share + share, C), BK):
        if LANES:
            lane = first // 32 + tl.arange(0, BK // 32)
            low, high = unpack_lanes(codes, scales, row.to(tl.int64), lane, row < N, C, CODEC, GROUP, table)
            offset, step = lane_columns(tl.arange(0, BK // 2), CODEC)
            column = first + offset[:, None]
            here = (token[None, :] < M) & (column < C)
            piece = tl.load(x + token[None, :] * C + column, mask=here, other=0.0)
            total = tl.dot(low.to(piece.dtype), piece, total)
            piece = tl.load(x + token[None, :] * C + column + step, mask=here, other=0.0)
            total = tl.dot(high.to(piece.dtype), piece, total)
        else:
            column = first + tl.arange(0, BK)
            here = (token[None, :] < M) & (column[:, None] < C)
            piece = tl.load(x + token[None, :] * C + column[:, None], mask=here, other=0.0)
            if CODEC == "i8" and (GROUP == 0 or GROUP % BK == 0):
                # Codes are exact in 16 bits: their scale is the sum's.
                place = row[:, None].to(tl.int64) * C + column[None, :]
                code = tl.load(codes + place, mask=inside & (column[None, :] < C), other=0)
                part = tl.dot(code.to(piece.dtype), piece)
                if GROUP > 0:
                    groups: tl.constexpr = (C + GROUP - 1) // GROUP
                    scale = tl.load(scales + row * groups + first // GROUP, mask=row < N, other=0.0)
                    part = part * scale.to(tl.float32)[:, None]
                total += part
            else:
                weight = unpack_row(
                    codes, scales, row[:, None].to(tl.int64), column[None, :], inside, C, CODEC, GROUP, table
                )
                total = tl.dot(weight.to(piece.dtype), piece, total)
    if CODEC == "i8" and GROUP == 0:
        total = total * tl.load(scales + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
    if BIAS:
        total += tl.load(bias + row, mask=(row < N) & (split == 0), other=0.0)[:, None]
    place = split.to(tl.int64) * split_stride + token[None, :].to(tl.int64) * stride + row[:, None]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside & (token[None, :] < M))


@dataclass(frozen=True, slots=True)
class RowsTile:
    """How a product is cut: output rows of a CTA, its warps, steps on their way, shares of the columns, columns of a
    step."""

    rows: int
    warps: int
    stages: int
    splits: int = 1
    columns: int = 64


def rows_tile_for(
    rows: int, columns: int, count: int, multiprocessors: int = 0, *, nibbles: bool = False
) -> RowsTile:
    """Small matrices need more CTAs than rows of 64 give, and few tokens of 4-bit codes (`nibbles`) longer steps:
    measured on one H100, 2026-11-24.

    `multiprocessors`: of a card whose columns may be split over them; 0: who reads `out` adds nothing.
    Never 8 warps: the compiler's pipeline over converted weights was seen to race with them.
    """
    longer = nibbles and count <= 16
    at_once, stages = (128, 4) if longer else (64, 6)
    if not multiprocessors or rows >= 8192:
        if rows < 8192:
            return RowsTile(16, 2, 6)
        return RowsTile(32, 4, stages, columns=at_once) if count <= 16 else RowsTile(64, 4, 4)
    ctas = -(-rows // 64) * -(-count // 64)
    splits = max(1, min(PARTIAL_SUMS, columns // 256, 2 * multiprocessors // ctas))
    return RowsTile(64, 4, 4, splits, at_once)


def rows_linear(matrix: Matrix, x: torch.Tensor, out: torch.Tensor, tile: RowsTile | None = None) -> None:
    """Launch it: x [M, C] -> `out` [M, N], or fp32 [splits of the tile, M, N]."""
    count = x.shape[0]
    height = min(64, max(16, triton.next_power_of_2(count)))
    tile = tile or rows_tile_for(matrix.rows, matrix.columns, count)
    assert tile.splits == (out.shape[0] if out.ndim == 3 else 1)
    rows_linear_kernel[(triton.cdiv(matrix.rows, tile.rows), triton.cdiv(count, height), tile.splits)](
        x,
        matrix.elements,
        matrix.scales,
        matrix.table_or_codes,
        x if matrix.bias is None else matrix.bias,
        out,
        count,
        matrix.rows,
        out.stride(-2),
        out.stride(0),
        C=matrix.columns,
        BM=height,
        BN=tile.rows,
        BK=tile.columns,
        CODEC=matrix.encoding.codec,
        GROUP=matrix.encoding.group_size,
        BIAS=matrix.bias is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
