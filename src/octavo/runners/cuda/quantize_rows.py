"""Activations with one scale a token, where no CTA of their producer sees a whole token: the second half of its work.

The producer leaves the values and the largest magnitude of each of its pieces; every CTA here finds the token's
largest among those. Contract: `Unquantized` of T tokens -> planes int8 [T, 2, C], zeros past F, and scales fp32
[T, 1] (`fixed_point`). Shape letters: T tokens, F columns, C of them padded, P pieces, PP the power of two at or above
it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.runners.cuda.fixed_point import Planes, block_scale, store_bytes
from octavo.runners.cuda.ptx import release_dependents, wait_for_inputs

_COLUMNS = 2048
"""Of a CTA."""


@dataclass(frozen=True, slots=True)
class Unquantized:
    """Values of T tokens whose scales are not known yet."""

    values: torch.Tensor
    """fp32 [T, F]."""
    largest: torch.Tensor
    """fp32 [T, P]: the largest magnitude of each piece of a token, infinite where one is not a number."""


@triton.jit
def quantize_rows_kernel(
    values, largest, pairs, scales, F: tl.constexpr, C: tl.constexpr, P: tl.constexpr, PP: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (T, ceil(C / BLOCK))."""
    release_dependents(PDL)
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    piece = tl.arange(0, PP)
    value = tl.load(values + token * F + column, mask=column < F, other=0.0)
    scale, inverse = block_scale(tl.max(tl.load(largest + token * P + piece, mask=piece < P, other=0.0)))
    store_bytes(pairs + token * (2 * C), column, value, inverse, C)
    tl.store(scales + token, scale)


def quantize_rows(x: Unquantized, out: Planes, *, pdl: bool) -> None:
    """Launch it: `out` of as many tokens, with one scale each."""
    tokens, pieces = x.largest.shape
    assert out.scales.shape == (tokens, 1)
    quantize_rows_kernel[(tokens, triton.cdiv(out.columns, _COLUMNS))](
        x.values,
        x.largest,
        out.pairs,
        out.scales,
        F=x.values.shape[1],
        C=out.columns,
        P=pieces,
        PP=triton.next_power_of_2(pieces),
        BLOCK=_COLUMNS,
        PDL=pdl,
        num_warps=8,
        launch_pdl=pdl,
    )
