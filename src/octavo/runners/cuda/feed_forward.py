"""act(gate) * up of many tokens, between the two products of the feed-forward block.

Contract: both [T, 2 F] (gate's columns first), or [T, F] where not gated, or the S partial sums of a split product
[S, T, ..], added in order -> out: values [T, C], planes (`fixed_point`) or int8 (`rounded`), zeros past F, since a
weight's code of 0 need not mean 0.
Shape letters: T tokens, F hidden columns, C padded columns, S splits, XB columns of a block of planes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.models.spec import DenseMLP
from octavo.runners.cuda.activation import activate
from octavo.runners.cuda.fixed_point import Planes, store_planes
from octavo.runners.cuda.gemv_inputs import shuffled_place
from octavo.runners.cuda.heads import load_sum
from octavo.runners.cuda.ptx import release_dependents, wait_for_inputs
from octavo.runners.cuda.rounded import Rounded, store_rounded


@triton.jit
def feed_forward_kernel(
    both, out, out_scales,
    F: tl.constexpr, C: tl.constexpr, SPLITS: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    OUT: tl.constexpr, BLOCKS: tl.constexpr, XB: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (T, ceil(C / (BLOCKS XB))). OUT: `planes`, `int8`, `values`, or `shuffled` as gemv's second input form."""
    release_dependents(PDL)
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * XB + tl.arange(0, XB)[None, :]
    inside = column < F
    WIDTH: tl.constexpr = 2 * F if GATED else F
    row = both + token * WIDTH
    split_stride = tl.num_programs(0) * WIDTH
    value = activate(load_sum(row + column, inside, split_stride, SPLITS), ACTIVATION)
    if GATED:
        value *= load_sum(row + F + column, inside, split_stride, SPLITS)
    if OUT == "planes":
        store_planes(
            out + token * (2 * C), out_scales + token * ((C + XB - 1) // XB), block, column, value, C, XB
        )
    elif OUT == "int8":
        store_rounded(out + token * C, out_scales + token, column, value, tl.num_programs(0), C, XB)
    else:
        place = shuffled_place(column) if OUT == "shuffled" else column
        tl.store(out + token * C + place, value.to(out.dtype.element_ty), mask=column < C)


def feed_forward(
    both: torch.Tensor,
    out: Planes | Rounded | torch.Tensor,
    spec: DenseMLP,
    *,
    shuffled: bool = False,
    pdl: bool,
) -> None:
    """Launch it: `both` [T, 2 F] or [T, F], or fp32 [S, T, ..]; `out` [T, C], or planes or int8 of as many tokens."""
    if isinstance(out, Planes):
        form, values, scales, block = "planes", out.pairs, out.scales, out.block_width
    elif isinstance(out, Rounded):
        block = int(triton.next_power_of_2(out.block_columns))
        form, values, scales = "int8", out.values, out.scales
    else:
        form, values, scales, block = "shuffled" if shuffled else "values", out, out, 64
    columns = values.shape[-1]
    blocks = max(1, min(1024 // block, triton.next_power_of_2(triton.cdiv(columns, block))))
    feed_forward_kernel[(values.shape[0], triton.cdiv(columns, blocks * block))](
        both,
        values,
        scales,
        F=spec.hidden_size,
        C=columns,
        SPLITS=both.shape[0] if both.ndim == 3 else 1,
        GATED=spec.gated,
        ACTIVATION=spec.activation,
        OUT=form,
        BLOCKS=blocks,
        XB=block,
        PDL=pdl,
        num_warps=max(4, min(16, block // 512)),
        launch_pdl=pdl,
    )
