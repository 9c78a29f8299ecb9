"""Rows of the embedding matrix -> the residual stream.

Contract: token ids int32 [T], or for decode rows the last token of each one's slot; a matrix of layout
`cuda-b64-1` -> h fp32 [T, K], times the model's multiplier. Shape letters: T tokens, K columns, C padded columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.runners.cuda.device_model import Matrix


@triton.jit
def unpack_row(codes, scales, row, column, valid, C: tl.constexpr, CODEC: tl.constexpr, GROUP: tl.constexpr):
    """fp32 weights at some columns of one row; `row` int64."""
    groups: tl.constexpr = (C + GROUP - 1) // GROUP if GROUP else 1
    group = column // GROUP if GROUP else column * 0
    if CODEC == "i8":
        code = tl.load(codes + row * C + column, mask=valid & (column < C), other=0).to(tl.float32)
        return code * tl.load(scales + row * groups + group, mask=valid & (column < C), other=0.0).to(
            tl.float32
        )
    elif CODEC == "u4":
        place = (column // 32) * 16 + column % 16
        byte = tl.load(codes + row * (C // 2) + place, mask=valid & (column < C), other=0).to(tl.int32)
        code = (byte >> ((column // 16) % 2 * 4)) & 15
        scale = tl.load(scales + (row * groups + group) * 2, mask=valid & (column < C), other=0.0).to(
            tl.float32
        )
        least = tl.load(scales + (row * groups + group) * 2 + 1, mask=valid & (column < C), other=0.0).to(
            tl.float32
        )
        return code.to(tl.float32) * scale + least
    else:
        return tl.load(codes + row * C + column, mask=valid & (column < C), other=0.0).to(tl.float32)


@triton.jit
def embedding_kernel(
    token_ids, slots, codes, scales, h, multiplier,
    K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, CODEC: tl.constexpr, GROUP: tl.constexpr,
    BY_SLOT: tl.constexpr,
):  # fmt: skip
    """Grid: (T, ceil(K / BLOCK)). BY_SLOT: `token_ids` holds the last token of every slot, `slots` [T] which.

    First of a step, so it has nothing to wait for and releases nobody early: what the step before wrote is
    visible to all kernels after it.
    """
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(slots + token) if BY_SLOT else token
    row = tl.load(token_ids + place).to(tl.int64)
    value = unpack_row(codes, scales, row, column, column < K, C, CODEC, GROUP)
    tl.store(h + token.to(tl.int64) * K + column, value * multiplier, mask=column < K)


def embed(
    matrix: Matrix, token_ids: torch.Tensor, slots: torch.Tensor | None, h: torch.Tensor, multiplier: float
) -> None:
    """Launch it: rows of h [T, K] for `token_ids` [T], or for the last tokens of `slots` [T]."""
    tokens, width = h.shape
    block = min(1024, triton.next_power_of_2(width))
    embedding_kernel[(tokens, triton.cdiv(width, block))](
        token_ids,
        token_ids if slots is None else slots,
        matrix.elements,
        matrix.scale_elements,
        h,
        multiplier,
        K=width,
        C=matrix.columns,
        BLOCK=block,
        CODEC=matrix.encoding.codec,
        GROUP=matrix.encoding.group_size,
        BY_SLOT=slots is not None,
        num_warps=4,
    )
