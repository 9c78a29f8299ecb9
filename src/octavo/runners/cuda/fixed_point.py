"""Activations as 16-bit fixed point: two signed bytes a value and one scale for each block of 32 columns.

value = (256 high + low) * scale, error at most scale / 2 = max|block| / 65,024. Integer products with weights
are then exact, and an outlier costs its own block only. Shape letters: T tokens, K columns (a multiple of 32).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_COLUMNS = 32
LARGEST = 32512.0
"""Largest magnitude: 127 * 256, so that the high byte never overflows."""

_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer in the low bits


@triton.jit
def quantize(x, inverse):
    """fp32 x and 1 / scale -> the integer 256 high + low in the low 16 bits of an int32 (above: noise)."""
    return (x * inverse + _ROUNDER).to(tl.int32, bitcast=True)


@triton.jit
def low_byte(q):
    return (q << 24) >> 24


@triton.jit
def high_byte(q):
    return ((q + 128) << 16) >> 24


@triton.jit
def pack_bytes(q0, q1, q2, q3):
    """Four of `quantize`'s integers -> words of their high and of their low bytes, q0 lowest."""
    low = (q0 & 255) | ((q1 & 255) << 8) | ((q2 & 255) << 16) | (q3 << 24)
    q0 += 128
    q1 += 128
    q2 += 128
    q3 += 128
    high = ((q0 >> 8) & 255) | (q1 & 0xFF00) | ((q2 & 0xFF00) << 8) | ((q3 & 0xFF00) << 16)
    return high, low


@triton.jit
def block_scale(largest):
    """max |x| of a block -> (scale, 1 / scale); a block of zeros gets a tiny scale."""
    largest = tl.maximum(largest, 1e-30)
    return largest * (
        1.0 / 32512.0
    ), 32512.0 / largest  # LARGEST: a constexpr divides no tensor when interpreted


def reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp32 [T, K] -> high, low int8 [T, K] and scales fp32 [T, K / 32]."""
    blocks = x.float().unflatten(-1, (-1, BLOCK_COLUMNS))
    largest = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    q = (blocks * (LARGEST / largest)).round().to(torch.int32)
    low = q.to(torch.int8)
    high = ((q - low) >> 8).to(torch.int8)
    return high.flatten(-2), low.flatten(-2), (largest * (1 / LARGEST)).squeeze(-1)


def dequantize(high: torch.Tensor, low: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """int8 [T, K] twice, fp32 [T, K / 32] -> fp32 [T, K]."""
    return (high.float() * 256 + low.float()) * scales.repeat_interleave(BLOCK_COLUMNS, -1)
