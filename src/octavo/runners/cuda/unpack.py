"""Single weights of a packed matrix: what every kernel but `gemv` reads them with.

Contract: columns of rows of layout `cuda-b64-1` -> fp32 weights, those of the format to the bit (llm-int8's 127th is
in its scales already, which may cost a last bit). Shape letters: N output rows, C padded columns, G group size.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def record_bytes(C: tl.constexpr, GROUP: tl.constexpr, EACH: tl.constexpr):
    """Of the two-level scales of a row."""
    return (EACH * (2 * ((C + 255) // 256) + (C + GROUP - 1) // GROUP) + 3) // 4 * 4


@triton.jit
def e4m3_value(code):
    """Codes 0..255 in int32 -> fp32, exact: the bits of a float16 that is 256 times smaller."""
    half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def split_f9z7(word):
    """int32 of 16 bits -> fp32 (scale, minus its zero): weight = scale * (code - zero). `octavo.quant.scales`."""
    scale = (((word & 0x1FF) << 19) + (105 << 23)).to(tl.float32, bitcast=True)
    return scale, ((word >> 9) & 127).to(tl.float32) * -0.125


@triton.jit
def _numbers(scales, row, group, mask, C: tl.constexpr, GROUP: tl.constexpr, EACH: tl.constexpr):
    """fp32 scales of groups and, where EACH is 2, their minimums."""
    if scales.dtype.element_ty == tl.uint8 or scales.dtype.element_ty == tl.int8:
        record = scales + row * record_bytes(C, GROUP, EACH)
        shared = record.to(tl.pointer_type(tl.float16), bitcast=True) + group * GROUP // 256 * EACH
        each = record + 2 * EACH * ((C + 255) // 256) + group * EACH
        scale = tl.load(each, mask=mask, other=0).to(tl.float32)
        scale = scale * tl.load(shared, mask=mask, other=0.0).to(tl.float32)
        least = 0.0
        if EACH == 2:
            least = tl.load(each + 1, mask=mask, other=0).to(tl.float32)
            least = least * tl.load(shared + 1, mask=mask, other=0.0).to(tl.float32)
        return scale, least
    elif scales.dtype.element_ty == tl.int16:
        word = tl.load(scales + row * ((C + GROUP - 1) // GROUP) + group, mask=mask, other=0)
        scale, zero = split_f9z7(word.to(tl.int32))
        return scale, scale * zero
    else:
        groups: tl.constexpr = (C + GROUP - 1) // GROUP if GROUP else 1
        place = scales + (row * groups + group) * EACH
        scale = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        least = 0.0
        if EACH == 2:
            least = tl.load(place + 1, mask=mask, other=0.0).to(tl.float32)
        return scale, least


@triton.jit
def unpack_row(
    codes, scales, row, column, valid, C: tl.constexpr, CODEC: tl.constexpr, GROUP: tl.constexpr, table=None
):  # fmt: skip
    """fp32 weights at some columns of one row; `row` int64. `table`: fp32 [16] of a codebook."""
    mask = valid & (column < C)
    if CODEC == "f16" or CODEC == "bf16" or CODEC == "f32":
        return tl.load(codes + row * C + column, mask=mask, other=0.0).to(tl.float32)
    else:
        EACH: tl.constexpr = 2 if CODEC == "u4" or CODEC == "i8m" else 1
        group = column // GROUP if GROUP else column * 0
        scale, least = _numbers(scales, row, group, mask, C, GROUP, EACH)
        if CODEC == "i8" or CODEC == "i8m" or CODEC == "e4m3":
            code = tl.load(codes + row * C + column, mask=mask, other=0).to(tl.int32)
            weight = e4m3_value(code) if CODEC == "e4m3" else code.to(tl.float32)
        elif CODEC == "u4" or CODEC == "i4":
            byte = tl.load(codes + row * (C // 2) + column // 32 * 16 + column % 16, mask=mask, other=0)
            code = (byte.to(tl.int32) >> (column // 16 % 2 * 4)) & 15
            weight = ((code ^ 8) - 8 if CODEC == "i4" else code).to(tl.float32)
        else:
            place = column // 32 * 16 + column % 16 // 4 * 4 + column // 16 % 2 * 2 + column // 2 % 2
            byte = tl.load(codes + row * (C // 2) + place, mask=mask, other=0)
            code = (byte.to(tl.int32) >> (column % 2 * 4)) & 15
            weight = tl.load(table + code, mask=mask, other=0.0)
        weight = weight * scale
        if EACH == 2:
            weight += least
        return weight


@triton.jit
def lane_columns(byte, CODEC: tl.constexpr):
    """(first, step) of 4-bit codes: in bytes of a row's lanes, the column of the low nibble, and how far the high one's
    is from it."""
    within = byte % 16
    if CODEC == "u4" or CODEC == "i4":
        return byte // 16 * 32 + within, 16
    else:
        return byte // 16 * 32 + within // 2 % 2 * 16 + within // 4 * 4 + within % 2 * 2, 1


@triton.jit
def unpack_lanes(
    codes, scales, row, lane, valid, C: tl.constexpr, CODEC: tl.constexpr, GROUP: tl.constexpr, table=None
):  # fmt: skip
    """fp32 weights [rows, 16 lanes] of 4-bit codes' low nibbles, and of their high ones: some lanes of 32 columns, in
    groups of whole lanes, whose numbers are read once a lane instead of once a weight. `row` int64 [rows]."""
    EACH: tl.constexpr = 2 if CODEC == "u4" else 1
    mask = valid[:, None] & (lane < C // 32)[None, :]
    scale, least = _numbers(scales, row[:, None], (lane * 32 // GROUP)[None, :], mask, C, GROUP, EACH)
    place = row[:, None, None] * (C // 2) + lane[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    byte = tl.load(codes + place, mask=mask[:, :, None], other=0).to(tl.int32)
    low = _weights_of_nibbles(byte & 15, scale, least, CODEC, table)
    return low, _weights_of_nibbles((byte >> 4) & 15, scale, least, CODEC, table)


@triton.jit
def _weights_of_nibbles(code, scale, least, CODEC: tl.constexpr, table):
    """Codes [rows, lanes, 16] and their numbers [rows, lanes] -> fp32 [rows, 16 lanes]."""
    if CODEC == "u4":
        weight = code.to(tl.float32) * scale[:, :, None] + least[:, :, None]
    elif CODEC == "i4":
        weight = ((code ^ 8) - 8).to(tl.float32) * scale[:, :, None]
    else:
        weight = tl.load(table + code) * scale[:, :, None]
    return tl.reshape(weight, (code.shape[0], code.shape[1] * 16))
