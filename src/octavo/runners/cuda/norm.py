"""Where blocks meet the residual stream: h += multiplier * post_norm(y), then x = pre_norm(h) for the next linear.

One CTA a token, so the sum is in place. Contract: h fp32 [T, K]; y [T, K], or the S partial sums of a split product
[S, T, K], added in order; x in one of four forms: `planes` (`fixed_point`), `int8` (`rounded`), `values` ([T, C] in
the type of `x`), or `none`. Columns past K are written as zeros. Norms: `none`, `rms`, `layernorm`, with gain (offset
included) and bias fp32 [K]. Shape letters: T tokens, K columns, C padded columns, S splits, XB columns of a block of
planes or int8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.runners.cuda.device_model import DeviceNorm
from octavo.runners.cuda.fixed_point import Planes, store_planes
from octavo.runners.cuda.heads import load_sum
from octavo.runners.cuda.layout import padded
from octavo.runners.cuda.ptx import release_dependents, wait_for_inputs
from octavo.runners.cuda.rounded import Rounded, store_rounded


@triton.jit
def normalize(x, valid, gain, bias, eps, K: tl.constexpr, KIND: tl.constexpr):
    """A norm of a tile that holds one vector of K values, zeros elsewhere."""
    if KIND == "layernorm":
        x = tl.where(valid, x - tl.sum(x) / K, 0.0)
    x = x * tl.rsqrt(tl.sum(x * x) / K + eps)
    return tl.where(valid, x * gain + bias, 0.0)


@triton.jit
def norm_kernel(
    h, y, post_gain, post_bias, pre_gain, pre_bias, x, x_scales, multiplier, post_eps, pre_eps,
    K: tl.constexpr, C: tl.constexpr, BLOCKS: tl.constexpr, SPLITS: tl.constexpr, POST: tl.constexpr,
    POST_BIAS: tl.constexpr, PRE: tl.constexpr, PRE_BIAS: tl.constexpr, OUT: tl.constexpr, XB: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid: T. BLOCKS: a power of two of blocks of XB columns, which hold C. SPLITS 0: there is no y."""
    release_dependents(PDL)
    token = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    column = block[:, None] * XB + tl.arange(0, XB)[None, :]
    valid = column < K
    gain = tl.load(pre_gain + column, mask=valid, other=0.0) if PRE != "none" else 1.0
    bias = tl.load(pre_bias + column, mask=valid, other=0.0) if PRE_BIAS else 0.0
    y_gain = tl.load(post_gain + column, mask=valid, other=0.0) if POST != "none" else 1.0
    y_bias = tl.load(post_bias + column, mask=valid, other=0.0) if POST_BIAS else 0.0
    wait_for_inputs(PDL)
    value = tl.load(h + token * K + column, mask=valid, other=0.0)
    if SPLITS > 0:
        addend = load_sum(y + token * K + column, valid, tl.num_programs(0) * K, SPLITS)
        if POST != "none":
            addend = normalize(addend, valid, y_gain, y_bias, post_eps, K, POST)
        value += addend * multiplier
        tl.store(h + token * K + column, value, mask=valid)
    if OUT != "none":
        if PRE != "none":
            value = normalize(value, valid, gain, bias, pre_eps, K, PRE)
        if OUT == "planes":
            store_planes(
                x + token * (2 * C), x_scales + token * ((C + XB - 1) // XB), block, column, value, C, XB
            )
        elif OUT == "int8":
            store_rounded(x + token * C, x_scales + token, column, value, tl.num_programs(0), C, XB)
        else:
            tl.store(x + token * C + column, value.to(x.dtype.element_ty), mask=column < C)


def join_residual(
    h: torch.Tensor,
    y: torch.Tensor | None,
    out: Planes | Rounded | torch.Tensor | None,
    *,
    post: DeviceNorm | None,
    pre: DeviceNorm | None,
    multiplier: float,
    pdl: bool,
) -> None:
    """Launch it: h [T, K] += multiplier * post(y), out [T, C] = pre(h); y [T, K], or fp32 [S, T, K]."""
    tokens, width = h.shape
    columns = padded(width)
    form, x, x_scales, width_of_block = "values", h, h, 32
    if isinstance(out, Planes):
        form, x, x_scales, width_of_block = "planes", out.pairs, out.scales, out.block_width
    elif isinstance(out, Rounded):
        form, x, x_scales = "int8", out.values, out.scales
        width_of_block = int(triton.next_power_of_2(out.block_columns))
    elif out is not None:
        x = out
    blocks = triton.next_power_of_2(triton.cdiv(columns, width_of_block))
    splits = 0 if y is None else y.shape[0] if y.ndim == 3 else 1
    norm_kernel[(tokens,)](
        h,
        h if y is None else y,
        h if post is None else post.gain,
        h if post is None or post.bias is None else post.bias,
        h if pre is None else pre.gain,
        h if pre is None or pre.bias is None else pre.bias,
        x,
        x_scales,
        multiplier,
        0.0 if post is None else post.eps,
        0.0 if pre is None else pre.eps,
        K=width,
        C=columns,
        BLOCKS=blocks,
        SPLITS=splits,
        POST="none" if post is None else post.kind,
        POST_BIAS=post is not None and post.bias is not None,
        PRE="none" if pre is None else pre.kind,
        PRE_BIAS=pre is not None and pre.bias is not None,
        OUT="none" if out is None else form,
        XB=width_of_block,
        PDL=pdl,
        num_warps=max(1, min(16, blocks * width_of_block // 128)),
        launch_pdl=pdl,
    )


def reference(
    x: torch.Tensor, kind: str, eps: float, gain: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The norm alone, fp32 [T, K] in and out."""
    if kind == "none":
        return x
    if kind == "layernorm":
        return torch.nn.functional.layer_norm(x, x.shape[-1:], gain, bias, eps)
    y = torch.nn.functional.rms_norm(x, x.shape[-1:], gain, eps)
    return y if bias is None else y + bias
