"""Activations as 16-bit fixed point: two signed bytes a value, and a scale for each block of columns or for all.

value = (256 high + low) * scale, error at most scale / 2 = max|block| / 65,024. Integer products with weights
are then exact, and an outlier costs its own block only. Batch 1 takes blocks of 32 columns, several rows those that
`batch_decode` chooses. Shape letters: T tokens, K columns, C of them padded, XB columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.runners.cuda.ptx import permute_bytes

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
    low = permute_bytes(permute_bytes(q0, q1, 0x0040), permute_bytes(q2, q3, 0x0040), 0x5410)
    q0 += 128
    q1 += 128
    q2 += 128
    q3 += 128
    high = permute_bytes(permute_bytes(q0, q1, 0x0051), permute_bytes(q2, q3, 0x0051), 0x5410)
    return high, low


@triton.jit
def magnitude(value):
    """|x|, infinite for what is not a number: a maximum drops those on a card, and a block must not come out finite."""
    return tl.where(value == value, tl.abs(value), float("inf"))


@triton.jit
def block_scale(largest):
    """max |x| of a block -> (scale, 1 / scale); a block of zeros gets a tiny scale."""
    largest = tl.maximum(largest, 1e-30)
    return largest * (
        1.0 / 32512.0
    ), 32512.0 / largest  # LARGEST: a constexpr divides no tensor when interpreted


@triton.jit
def store_bytes(pairs, column, value, inverse, C: tl.constexpr):
    """One token's `value` fp32 at `column`, times 1 / scale -> its bytes at `pairs` [2, C]."""
    q = quantize(value, inverse)
    tl.store(pairs + column, high_byte(q).to(tl.int8), mask=column < C)
    tl.store(pairs + C + column, low_byte(q).to(tl.int8), mask=column < C)


@triton.jit
def store_planes(pairs, scales, block, column, value, C: tl.constexpr, XB: tl.constexpr):
    """One token's `value` fp32 [blocks, XB] of `block`s, at `column` -> its bytes at `pairs` [2, C], scales
    [ceil(C / XB)]."""
    scale, inverse = block_scale(tl.max(magnitude(value), 1))
    store_bytes(pairs, column, value, inverse[:, None], C)
    tl.store(scales + block, scale, mask=block < (C + XB - 1) // XB)


@triton.jit
def store_planes_of_rows(
    pairs, scales, value, first, token, present, columns, BN: tl.constexpr, BM: tl.constexpr, XB: tl.constexpr
):
    """`value` fp32 [BN columns, BM tokens] from column `first` on -> bytes at `pairs` [T, 2, columns] and scales."""
    blocks = tl.reshape(value, (BN // XB, XB, BM))
    scale, inverse = block_scale(tl.max(magnitude(blocks), 1))
    q = tl.reshape(quantize(blocks, inverse[:, None, :]), (BN, BM))
    column = first + tl.arange(0, BN)
    wanted = present[None, :] & (column < columns)[:, None]
    place = token.to(tl.int64)[None, :] * (2 * columns) + column[:, None]
    tl.store(pairs + place, high_byte(q).to(tl.int8), mask=wanted)
    tl.store(pairs + columns + place, low_byte(q).to(tl.int8), mask=wanted)
    block = first // XB + tl.arange(0, BN // XB)
    tl.store(
        scales + token[None, :] * (columns // XB) + block[:, None],
        scale,
        mask=present[None, :] & (block < columns // XB)[:, None],
    )


@dataclass(frozen=True, slots=True)
class Planes:
    """Activations of T tokens in fixed point."""

    pairs: torch.Tensor
    """int8 [T, 2, C]: a token's high bytes, then its low bytes."""
    scales: torch.Tensor
    """fp32 [T, C / block_columns]: a scale for each block, or one for all columns."""

    @property
    def columns(self) -> int:
        return self.pairs.shape[2]

    @property
    def block_columns(self) -> int:
        return self.columns // self.scales.shape[1]

    @property
    def block_width(self) -> int:
        """XB of kernels: a power of two."""
        return int(triton.next_power_of_2(self.block_columns))

    @property
    def nbytes(self) -> int:
        return self.pairs.nbytes + self.scales.nbytes


def reference(x: torch.Tensor, block_columns: int) -> Planes:
    """fp32 [T, K] quantized."""
    blocks = x.float().unflatten(-1, (-1, block_columns))
    largest = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    q = (blocks * (LARGEST / largest)).round().to(torch.int32)
    low = q.to(torch.int8)
    high = ((q - low) >> 8).to(torch.int8)
    return Planes(torch.stack((high.flatten(-2), low.flatten(-2)), 1), (largest * (1 / LARGEST)).squeeze(-1))


def dequantize(planes: Planes) -> torch.Tensor:
    """fp32 [T, K]."""
    high, low = planes.pairs.float().unbind(1)
    return (high * 256 + low) * planes.scales.repeat_interleave(planes.block_columns, -1)
