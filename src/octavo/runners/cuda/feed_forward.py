"""act(gate) * up of many tokens, between the two products of the feed-forward block.

Contract: both [T, 2 F] (gate's columns first), or [T, F] where not gated -> out [T, WIDTH], columns past F left
alone. Shape letters: T tokens, F hidden columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.models.spec import DenseMLP
from octavo.runners.cuda.activation import activate
from octavo.runners.cuda.gemv import shuffled_place
from octavo.runners.cuda.ptx import release_dependents, wait_for_inputs


@triton.jit
def feed_forward_kernel(
    both, out, F: tl.constexpr, WIDTH: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    SHUFFLED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (T, ceil(F / BLOCK)). SHUFFLED: columns in the order of gemv's second input form."""
    release_dependents(PDL)
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    row = both + token * (2 * F if GATED else F)
    value = activate(tl.load(row + column, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        value *= tl.load(row + F + column, mask=inside, other=0.0).to(tl.float32)
    place = shuffled_place(column) if SHUFFLED else column
    tl.store(out + token * WIDTH + place, value.to(out.dtype.element_ty), mask=inside)


def feed_forward(both: torch.Tensor, out: torch.Tensor, spec: DenseMLP, *, shuffled: bool, pdl: bool) -> None:
    """Launch it: `both` [T, 2 F] or [T, F], `out` [T, WIDTH]."""
    width = spec.hidden_size
    block = min(1024, triton.next_power_of_2(width))
    feed_forward_kernel[(both.shape[0], triton.cdiv(width, block))](
        both,
        out,
        F=width,
        WIDTH=out.shape[1],
        GATED=spec.gated,
        ACTIVATION=spec.activation,
        SHUFFLED=shuffled,
        BLOCK=block,
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )
