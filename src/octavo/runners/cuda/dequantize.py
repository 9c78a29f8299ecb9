"""A packed matrix -> 16- or 32-bit values, for products of many rows where a library's kernel is fastest.

Contract: [N, C] of layout `cuda-b64-1` -> [N, C] in the type of `out`; columns past K are what code 0 stands
for. Shape letters: N output rows, C padded columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.runners.cuda.device_model import Matrix
from octavo.runners.cuda.unpack import unpack_row


@triton.jit
def dequantize_kernel(
    codes, scales, table, out, C: tl.constexpr, BLOCK: tl.constexpr, CODEC: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Grid: (N, ceil(C / BLOCK))."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = unpack_row(codes, scales, row, column, column < C, C, CODEC, GROUP, table)
    tl.store(out + row * C + column, value.to(out.dtype.element_ty), mask=column < C)


def dequantize(matrix: Matrix, first: int, last: int, out: torch.Tensor) -> None:
    """Launch it for rows [first, last): `out` [last - first, C]."""
    block = min(2048, triton.next_power_of_2(matrix.columns))
    codes = matrix.elements.view(matrix.rows, -1)[first:last]
    scales = matrix.scales
    if scales.numel():
        scales = scales.view(matrix.rows, -1)[first:last]
    dequantize_kernel[(last - first, triton.cdiv(matrix.columns, block))](
        codes,
        scales,
        matrix.table_or_codes,
        out,
        C=matrix.columns,
        BLOCK=block,
        CODEC=matrix.encoding.codec,
        GROUP=matrix.encoding.group_size,
        num_warps=4,
    )
