"""Activations rounded to int8, with a scale for each block of columns or for all: what `activations` int8 asks for.

value = code * scale, error at most scale / 2 = max|block| / 254; an outlier costs its own block only.
Shape letters: T tokens, K columns, C of them padded, XB columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from octavo.runners.cuda.fixed_point import magnitude, quantize


@triton.jit
def store_rounded(values, scales, column, value, block_stride, C: tl.constexpr, XB: tl.constexpr):
    """One token's `value` fp32 [blocks, XB] at `column` -> codes at `values` [C], scales `block_stride` apart."""
    largest = tl.maximum(tl.max(magnitude(value), 1), 1e-30)
    q = quantize(value, (127.0 / largest)[:, None])
    tl.store(values + column, q.to(tl.int8), mask=column < C)
    block = tl.min(column, 1) // XB
    tl.store(scales + block * block_stride, largest * (1.0 / 127.0), mask=block < (C + XB - 1) // XB)


@triton.jit(do_not_specialize=["T"])
def round_kernel(x, values, scales, T, C: tl.constexpr, BLOCKS: tl.constexpr, XB: tl.constexpr):
    """Grid: (T, ceil(C / (BLOCKS XB)))."""
    token = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS))[:, None] * XB + tl.arange(0, XB)[None, :]
    value = tl.load(x + token * C + column, mask=column < C, other=0.0).to(tl.float32)
    store_rounded(values + token * C, scales + token, column, value, T, C, XB)


@dataclass(frozen=True, slots=True)
class Rounded:
    """Activations of T tokens."""

    values: torch.Tensor
    """int8 [T, C]."""
    scales: torch.Tensor
    """fp32 [ceil(C / XB), T]: a block's together."""
    block_columns: int
    """XB; the last block may be shorter."""

    @staticmethod
    def empty(tokens: int, columns: int, block_columns: int, device: torch.device) -> Rounded:
        block_columns = min(block_columns, columns)
        values = torch.empty((tokens, columns), dtype=torch.int8, device=device)
        scales = torch.empty((triton.cdiv(columns, block_columns), tokens), device=device)
        return Rounded(values, scales, block_columns)


def round_values(x: torch.Tensor, out: Rounded) -> None:
    """Launch it: x [T, C] in any float type, contiguous."""
    tokens, columns = x.shape
    block = int(triton.next_power_of_2(out.block_columns))
    blocks = max(1, min(2048 // block, triton.next_power_of_2(triton.cdiv(columns, block))))
    round_kernel[(tokens, triton.cdiv(columns, blocks * block))](
        x, out.values, out.scales, tokens, C=columns, BLOCKS=blocks, XB=block, num_warps=4
    )


def reference(x: torch.Tensor, block_columns: int) -> Rounded:
    """fp32 [T, K] rounded; K need not be whole blocks."""
    columns = x.shape[1]
    blocks = F.pad(x.float(), (0, -columns % block_columns)).unflatten(-1, (-1, block_columns))
    largest = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    codes = (blocks * (127.0 / largest)).round().to(torch.int8).flatten(-2)[:, :columns]
    scales = (largest * (1 / 127)).squeeze(-1).T.contiguous()
    return Rounded(codes.contiguous(), scales, block_columns)


def dequantized(x: Rounded, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[T, K] of that type."""
    scales = x.scales.T.repeat_interleave(x.block_columns, -1)[:, : x.values.shape[1]]
    return (x.values * scales).to(dtype)
