"""The activations of a `gemv`, in registers beside the tiles of codes: quantized when loaded, or here.

Contract: x [C] in one of gemv's input forms -> for each step of L lanes words of high and low bytes [L, 1, 4], one pair
for each 16 columns of a lane, and the lanes' scales [L, 1]; or fp32 values. Shape letters: C padded columns, L lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.runners.cuda.fixed_point import block_scale, magnitude, pack_bytes, quantize
from octavo.runners.cuda.ptx import dp4a


@triton.jit
def shuffled_place(column):
    """Where a column stands in a shuffled vector: 4 i + j and 4 j + i of each block of 16 are exchanged."""
    return (column & -16) | ((column & 3) << 2) | ((column >> 2) & 3)


@triton.jit
def load_planes(high, low, scales, C: tl.constexpr, L: tl.constexpr, STEPS: tl.constexpr, LANE: tl.constexpr):
    """Quantized activations: words of high and low bytes [L, 1, 4] for each 16 columns of a lane, and scales."""
    lane = tl.arange(0, L)[:, None, None]
    word = tl.arange(0, 4)[None, None, :]
    flat = tl.arange(0, L)[:, None]
    words = ()
    factors = ()
    for step in tl.static_range(STEPS):
        mask = step * L + lane < C // LANE
        for half in tl.static_range(LANE // 16):
            place = (step * L + lane) * (LANE // 4) + half * 4 + word
            words = words + (
                tl.load(high + place, mask=mask, other=0),
                tl.load(low + place, mask=mask, other=0),
            )
        factors = factors + (
            tl.load(scales + (step * L + flat) * LANE // 32, mask=step * L + flat < C // LANE, other=0.0),
        )
    return words, factors


@triton.jit
def load_gains(gain, C: tl.constexpr, L: tl.constexpr, STEPS: tl.constexpr, LANE: tl.constexpr):
    """A norm's gain in shuffled order, as `quantize_shuffled` takes it."""
    lane = tl.arange(0, L)[:, None, None]
    word = tl.arange(0, 4)[None, None, :]
    gains = ()
    for step in tl.static_range(STEPS):
        mask = step * L + lane < C // LANE
        for plane in tl.static_range(LANE // 4):
            place = (step * L + lane) * LANE + plane * 4 + word
            gains = gains + (tl.load(gain + place, mask=mask, other=0.0),)
    return gains


@triton.jit
def quantize_shuffled(
    x, gains, C: tl.constexpr, L: tl.constexpr, STEPS: tl.constexpr, LANE: tl.constexpr, NORMED: tl.constexpr
):
    """As `load_planes`, from fp32 in shuffled order: a plane of every fourth column is contiguous there.

    NORMED: of x times `gains`; then also the sum of squares of x.
    """
    lane = tl.arange(0, L)[:, None, None]
    word = tl.arange(0, 4)[None, None, :]
    words = ()
    factors = ()
    squares = tl.zeros((L, 1, 4), tl.float32)
    for step in tl.static_range(STEPS):
        mask = step * L + lane < C // LANE
        values = ()
        largest = tl.zeros((L, 1, 4), tl.float32)
        for plane in tl.static_range(LANE // 4):
            value = tl.load(x + (step * L + lane) * LANE + plane * 4 + word, mask=mask, other=0.0)
            if NORMED:
                squares += value * value
                value *= gains[step * (LANE // 4) + plane]
            values = values + (value,)
            largest = tl.maximum(largest, tl.abs(value), propagate_nan=tl.PropagateNan.ALL)
        scale, inverse = block_scale(tl.max(magnitude(largest), 2))
        for half in tl.static_range(LANE // 16):
            q0 = quantize(values[half * 4], inverse[:, :, None])
            q1 = quantize(values[half * 4 + 1], inverse[:, :, None])
            q2 = quantize(values[half * 4 + 2], inverse[:, :, None])
            q3 = quantize(values[half * 4 + 3], inverse[:, :, None])
            words = words + pack_bytes(q0, q1, q2, q3)
        factors = factors + (scale,)
    return words, factors, squares


@triton.jit
def load_values(
    x, C: tl.constexpr, L: tl.constexpr, STEPS: tl.constexpr, LANE: tl.constexpr, BYTES: tl.constexpr
):
    """fp32 [L, 1, LANE] a step, beside plain values; where BYTES, four [L, 1, 4], beside the bytes of words."""
    lane = tl.arange(0, L)[:, None, None]
    values = ()
    for step in tl.static_range(STEPS):
        mask = step * L + lane < C // LANE
        if BYTES:
            word = tl.arange(0, 4)[None, None, :]
            for byte in tl.static_range(4):
                place = (step * L + lane) * LANE + word * 4 + byte
                values = values + (tl.load(x + place, mask=mask, other=0.0),)
        else:
            item = tl.arange(0, LANE)[None, None, :]
            values = values + (tl.load(x + (step * L + lane) * LANE + item, mask=mask, other=0.0),)
    return values


@triton.jit
def sums_of(words, L: tl.constexpr, HALVES: tl.constexpr, BLOCKS: tl.constexpr):
    """Integer sums [L, 1] of the activations of each of HALVES parts of BLOCKS 16 columns: what a group's minimum is
    multiplied with."""
    ones = tl.full((L, 1, 4), 0x01010101, tl.int32)
    sums = ()
    for half in tl.static_range(HALVES):
        high = tl.zeros((L, 1, 4), tl.int32)
        low = high
        for block in tl.static_range(BLOCKS):
            high = dp4a(ones, words[(half * BLOCKS + block) * 2], high)
            low = dp4a(ones, words[(half * BLOCKS + block) * 2 + 1], low)
        sums = sums + (tl.sum(high * 256 + low, 2),)
    return sums
