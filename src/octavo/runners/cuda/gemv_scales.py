"""Scales and minimums of groups, beside the tiles of codes that `gemv` reads: loaded raw, as few bytes as they are
stored in, a tile ahead, and taken apart when they are needed.

Contract: rows of the scales of layout `cuda-b64-1` -> fp32 [L, BN] of each lane's group. Shape letters: N output rows,
C padded columns, L lanes at once, BN rows at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.runners.cuda.ptx import opaque
from octavo.runners.cuda.unpack import record_bytes, split_f9z7


@triton.jit
def load_scales(
    scales, rows, wanted, C: tl.constexpr, L: tl.constexpr, STEPS: tl.constexpr,
    LANE: tl.constexpr, GROUP: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """For each of STEPS and each group in a lane the raw numbers, tiles [L, BN] that `group_numbers` reads; [BN]
    where a row has one."""
    if GROUP == 0 and EACH == 1:
        return (tl.load(scales + rows, mask=wanted, other=0),)
    else:
        HALVES: tl.constexpr = 2 if GROUP == 16 and LANE == 32 else 1
        lane = tl.arange(0, L)[:, None]
        groups: tl.constexpr = (C + GROUP - 1) // GROUP if GROUP else 1
        kind: tl.constexpr = scales.dtype.element_ty
        tiles = ()
        for half in tl.static_range(STEPS * HALVES):
            at = half // HALVES * L + lane
            mask = wanted[None, :] & (at < C // LANE)
            column = at * LANE + half % HALVES * 16
            group = opaque(column // GROUP if GROUP else at * 0)
            if kind == tl.uint8 or kind == tl.int8:
                record = scales + rows[None, :] * record_bytes(C, GROUP, EACH)
                number = record + 2 * EACH * ((C + 255) // 256)
                shared = opaque(column // 256)
                if EACH == 2:
                    numbers = tl.load(_as(number, tl.uint16) + group, mask=mask, other=0)
                    tiles = tiles + (numbers, tl.load(_as(record, tl.int32) + shared, mask=mask, other=0))
                else:
                    numbers = tl.load(number + group, mask=mask, other=0)
                    tiles = tiles + (numbers, tl.load(_as(record, tl.float16) + shared, mask=mask, other=0))
            else:
                place = rows[None, :] * groups + group
                if EACH == 1 or kind == tl.int16:
                    tiles = tiles + (tl.load(scales + place, mask=mask, other=0),)
                elif kind == tl.float16:
                    tiles = tiles + (tl.load(_as(scales, tl.int32) + place, mask=mask, other=0),)
                else:
                    tiles = tiles + (
                        tl.load(scales + 2 * place, mask=mask, other=0),
                        tl.load(scales + 2 * place + 1, mask=mask, other=0),
                    )
        return tiles


@triton.jit
def _as(pointer, KIND: tl.constexpr):
    return pointer.to(tl.pointer_type(KIND), bitcast=True)


@triton.jit
def _half(word, HIGH: tl.constexpr):
    """The low or the high 16 bits as a float16, in fp32."""
    bits = word >> 16 if HIGH else word & 0xFFFF
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def group_numbers(raw, half: tl.constexpr, EACH: tl.constexpr):
    """What `load_scales` loaded for one of its tiles -> fp32 [L, BN] scales and, where EACH is 2, minimums."""
    kind: tl.constexpr = raw[0].dtype
    least = 0.0
    if kind == tl.int16:
        scale, zero = split_f9z7(raw[half].to(tl.int32))
        least = scale * zero
    elif kind == tl.uint16:
        pair = raw[2 * half].to(tl.int32)
        scale = (pair & 255).to(tl.float32) * _half(raw[2 * half + 1], False)
        least = ((pair >> 8) & 255).to(tl.float32) * _half(raw[2 * half + 1], True)
    elif kind == tl.int8 or kind == tl.uint8:
        scale = raw[2 * half].to(tl.float32) * raw[2 * half + 1].to(tl.float32)
    elif kind == tl.int32:
        scale = _half(raw[half], False)
        least = _half(raw[half], True)
    elif EACH == 2:
        scale = raw[2 * half]
        least = raw[2 * half + 1]
    else:
        scale = raw[half].to(tl.float32)
    return scale, least
