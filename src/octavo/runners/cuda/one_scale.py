"""int8 weights in groups -> int8 with one scale a row, for products whose integers are summed over all columns.

The new scale is the row's largest weight over 127; a weight moves by half of it at most. Contract: codes int8 [N, C]
and scales [N, C / GROUP] -> codes int8 [N, C] and scales fp32 [N]. Shape letters: N output rows, C padded columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.runners.cuda.device_model import Matrix
from octavo.runners.cuda.fixed_point import quantize


@triton.jit
def one_scale_kernel(
    codes, scales, out, out_scales, C: tl.constexpr, C_P2: tl.constexpr, GROUP: tl.constexpr
):
    """Grid: N."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, C_P2)
    groups: tl.constexpr = (C + GROUP - 1) // GROUP
    scale = tl.load(scales + row * groups + column // GROUP, mask=column < C, other=0.0).to(tl.float32)
    value = tl.load(codes + row * C + column, mask=column < C, other=0).to(tl.float32) * scale
    largest = tl.maximum(tl.max(tl.abs(value), 0), 1e-30)
    tl.store(out + row * C + column, quantize(value, 127.0 / largest).to(tl.int8), mask=column < C)
    tl.store(out_scales + row, largest * (1.0 / 127.0))


def one_scale(matrix: Matrix, first: int, last: int, out: torch.Tensor, out_scales: torch.Tensor) -> None:
    """Launch it for rows [first, last): `out` int8 [last - first, C], `out_scales` fp32."""
    codes = matrix.elements.view(matrix.rows, -1)[first:last]
    scales = matrix.scales.view(matrix.rows, -1)[first:last]
    width = triton.next_power_of_2(matrix.columns)
    one_scale_kernel[(last - first,)](
        codes,
        scales,
        out,
        out_scales,
        C=matrix.columns,
        C_P2=width,
        GROUP=matrix.encoding.group_size,
        num_warps=max(1, min(16, width // 512)),
    )


def reference(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights fp32 [N, C] -> codes and scales."""
    largest = values.abs().amax(1).clamp_min(1e-30)
    return (values * (127.0 / largest)[:, None]).round().to(torch.int8), largest * (1 / 127)
