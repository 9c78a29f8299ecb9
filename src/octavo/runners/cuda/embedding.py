"""Rows of the embedding matrix -> the residual stream.

Contract: token ids int32 [T], or for decode rows the last token of each one's slot; a matrix of layout
`cuda-b64-1` -> h fp32 [T, K], times the model's multiplier. Shape letters: T tokens, K columns, C padded columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.runners.cuda.device_model import Matrix
from octavo.runners.cuda.gemv_inputs import shuffled_place
from octavo.runners.cuda.unpack import unpack_row


@triton.jit
def embedding_kernel(
    token_ids, slots, codes, scales, table, h, multiplier,
    K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, CODEC: tl.constexpr, GROUP: tl.constexpr,
    BY_SLOT: tl.constexpr, SHUFFLED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid: (T, ceil(K / BLOCK)). BY_SLOT: `token_ids` holds the last token of every slot, `slots` [T] which.

    First of a step, so it has nothing to wait for and releases nobody early: what the step before wrote is
    visible to all kernels after it.
    """
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(slots + token) if BY_SLOT else token
    row = tl.load(token_ids + source).to(tl.int64)
    value = unpack_row(codes, scales, row, column, column < K, C, CODEC, GROUP, table)
    place = shuffled_place(column) if SHUFFLED else column
    tl.store(h + token.to(tl.int64) * WIDTH + place, value * multiplier, mask=column < K)


def embed(
    matrix: Matrix,
    token_ids: torch.Tensor,
    slots: torch.Tensor | None,
    h: torch.Tensor,
    multiplier: float,
    *,
    width: int | None = None,
    shuffled: bool = False,
) -> None:
    """Launch it: rows of h [T, K] for `token_ids` [T], or for the last tokens of `slots` [T].

    `width` K where h is wider; `shuffled`: in the order of gemv's second input form.
    """
    tokens = h.shape[0]
    width = width or h.shape[1]
    block = min(1024, triton.next_power_of_2(width))
    embedding_kernel[(tokens, triton.cdiv(width, block))](
        token_ids,
        token_ids if slots is None else slots,
        matrix.elements,
        matrix.scales,
        matrix.table_or_codes,
        h,
        multiplier,
        K=width,
        C=matrix.columns,
        BLOCK=block,
        CODEC=matrix.encoding.codec,
        GROUP=matrix.encoding.group_size,
        BY_SLOT=slots is not None,
        SHUFFLED=shuffled,
        WIDTH=h.shape[1],
        num_warps=4,
    )
