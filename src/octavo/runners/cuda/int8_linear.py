"""Activations rounded to int8 times int8 rows: the linears of a prefill where `activations` is int8.

Integers are summed over a block of x, whose scale multiplies the sum; the scale of a row of weights multiplies the
whole. Weights in groups are rounded to a scale a row first (`one_scale`): multiplying every 64 columns would leave
nothing of the gain.
Contract: values int8 [M, C] and scales fp32 [C / XB, M] (`rounded`), codes int8 [N, C] and their scales fp32 [N] ->
out [M, N], which may be columns of a wider one (+ bias).
Shape letters: M rows of x, N output rows, C padded columns; BM, BN, BK of each at once, XB columns of a block of x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.runners.cuda.rounded import Rounded


@triton.jit
def _load_tile(
    source, first, column, rows, C: tl.constexpr, HEIGHT: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr
):  # fmt: skip
    """int8 [HEIGHT, BK] at row `first` of [rows, C], zeros past its end."""
    if DESCRIPTORS:
        return source.load([first, column])
    else:
        row = first + tl.arange(0, HEIGHT)[:, None]
        place = column + tl.arange(0, BK)[None, :]
        return tl.load(source + row.to(tl.int64) * C + place, mask=(row < rows) & (place < C), other=0)


@triton.jit(do_not_specialize=["M", "N", "stride"])
def int8_linear_kernel(
    x, weights, x_scales, scales, bias, out, M, N, stride,
    C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, XB: tl.constexpr, TALL: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Grid: ceil(M / BM) ceil(N / BN), TALL tiles of x meet a tile of weights one after the other.

    BK divides XB; XB 0: all columns have one scale. `x` and `weights` are descriptors of [BM, BK] and [BN, BK] of
    them, or pointers.
    """
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    batch = tl.program_id(0) // (TALL * tiles_n)
    tall = tl.minimum(tiles_m - batch * TALL, TALL)
    within = tl.program_id(0) % (TALL * tiles_n)
    tile_m = batch * TALL + within % tall
    tile_n = within // tall
    token = tile_m * BM + tl.arange(0, BM)
    row = tile_n * BN + tl.arange(0, BN)
    present = token < M
    inside = row < N
    if XB == 0:
        whole = tl.zeros((BM, BN), tl.int32)
        for column in tl.range(0, C, BK):
            code = _load_tile(weights, tile_n * BN, column, N, C, BN, BK, DESCRIPTORS)
            value = _load_tile(x, tile_m * BM, column, M, C, BM, BK, DESCRIPTORS)
            whole = tl.dot(value, code.T, whole, out_dtype=tl.int32)
        total = whole.to(tl.float32) * tl.load(x_scales + token, mask=present, other=0.0)[:, None]
    else:
        total = tl.zeros((BM, BN), tl.float32)
        factor = tl.load(x_scales + token, mask=present, other=0.0)
        for first in tl.range(0, C, XB):
            # Asked for before its block, so that nothing waits for it.
            after = present & (first + XB < C)
            next_factor = tl.load(x_scales + (first // XB + 1) * M + token, mask=after, other=0.0)
            part = tl.zeros((BM, BN), tl.int32)
            for step in tl.static_range(XB // BK):
                code = _load_tile(weights, tile_n * BN, first + step * BK, N, C, BN, BK, DESCRIPTORS)
                value = _load_tile(x, tile_m * BM, first + step * BK, M, C, BM, BK, DESCRIPTORS)
                part = tl.dot(value, code.T, part, out_dtype=tl.int32)
            total += part.to(tl.float32) * factor[:, None]
            factor = next_factor
    total = total * tl.load(scales + row, mask=inside, other=0.0)[None, :]
    if BIAS:
        total += tl.load(bias + row, mask=inside, other=0.0)[None, :]
    place = token[:, None].to(tl.int64) * stride + row[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=present[:, None] & inside[None, :])


@dataclass(frozen=True, slots=True)
class Int8Tile:
    """How a product is cut."""

    tokens: int
    rows: int
    columns: int
    """Of a step."""
    stages: int
    """Steps on their way."""
    warps: int


LARGE = Int8Tile(128, 128, 128, 3, 8)
SMALL = Int8Tile(64, 128, 128, 3, 4)


def int8_tile_for(rows: int, columns: int) -> Int8Tile:
    """The faster for Gemma-2-2B's and Llama-3.1-8B's linears and 2,048 tokens: one H100, 2026-11-24."""
    return LARGE if rows >= 4096 and columns >= 4096 else SMALL


def int8_linear(
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    x: Rounded,
    out: torch.Tensor,
    tile: Int8Tile | None = None,
    *,
    descriptors: bool,
) -> None:
    """Launch it: codes [N, C], scales fp32 [N], x of M tokens -> `out` [M, N], rows contiguous."""
    (rows, columns), count = codes.shape, x.values.shape[0]
    tile = tile or int8_tile_for(rows, columns)
    own = 0 if x.scales.shape[0] == 1 else x.block_columns
    step = min(tile.columns, own or tile.columns)
    int8_linear_kernel[(triton.cdiv(count, tile.tokens) * triton.cdiv(rows, tile.rows),)](
        TensorDescriptor.from_tensor(x.values, [tile.tokens, step]) if descriptors else x.values,
        TensorDescriptor.from_tensor(codes, [tile.rows, step]) if descriptors else codes,
        x.scales,
        scales,
        scales if bias is None else bias,
        out,
        count,
        rows,
        out.stride(0),
        C=columns,
        BM=tile.tokens,
        BN=tile.rows,
        BK=step,
        XB=own,
        TALL=8,
        DESCRIPTORS=descriptors,
        BIAS=bias is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
