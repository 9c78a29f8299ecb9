"""Queries and keys on their way into attention: the norm of q and k, then the rotary embedding.

Contract: heads of D values at `base + offset` -> fp32 [R, DP], zeros past D; S partial sums of a split product,
`split_stride` apart, are added in order. Pairs are (i, i + HALF) as in Hugging Face's rotate_half, dims past 2 HALF
pass through; HALF 0: no rotation. NORM: `none`; `head`: rms over D; `full`: rms over all WIDTH values at `base`
(every head of the projection). Shape letters: R rows (heads), D head dim, DP the power of two at or above it.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl

from octavo.runners.cuda.device_model import DeviceLayer


@triton.jit
def load_sum(pointers, mask, split_stride, S: tl.constexpr):
    """fp32 sum of S values `split_stride` apart, zero where `mask` is not.

    The stride is one that a kernel makes of sizes it knows: beside one of its arguments values are loaded one by one.
    """
    value = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, S):
        value += tl.load(pointers + split * split_stride, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def load_heads(
    base, offset, gain, gain_offset, dim, valid, cosine, sine, eps, split_stride,
    D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, WIDTH: tl.constexpr, WIDTH_P2: tl.constexpr,
    S: tl.constexpr,
):  # fmt: skip
    """`offset` [R, 1] of each head, `dim` [1, DP], `valid` [R, DP], `cosine` and `sine` [1, DP] of dim mod HALF."""
    value = load_sum(base + offset + dim, valid, split_stride, S)
    scale = 1.0
    if NORM == "head":
        scale = tl.rsqrt(tl.sum(value * value, 1) / D + eps)[:, None]
    if NORM == "full":
        every = tl.arange(0, WIDTH_P2)
        whole = load_sum(base + every, every < WIDTH, split_stride, S)
        scale = tl.rsqrt(tl.sum(whole * whole) / WIDTH + eps)
    if NORM != "none":
        value = value * scale * tl.load(gain + gain_offset + dim, mask=valid, other=0.0)
    if HALF > 0:
        partner = tl.where(dim < HALF, dim + HALF, tl.where(dim < 2 * HALF, dim - HALF, dim))
        other = load_sum(base + offset + partner, valid, split_stride, S)
        if NORM != "none":
            other = other * scale * tl.load(gain + gain_offset + partner, mask=valid, other=0.0)
        turned = value * cosine + tl.where(dim < HALF, -other, other) * sine
        value = tl.where(dim < 2 * HALF, turned, value)
    return value


@triton.jit
def load_angles(cosines, sines, position, dim, HALF: tl.constexpr):
    """cos and sin of a position [1, DP], in the place of every dim they turn; tables fp32 [context, HALF]."""
    if HALF > 0:
        pair = tl.where(dim < HALF, dim, dim - HALF)
        rotated = dim < 2 * HALF
        cosine = tl.load(cosines + position * HALF + pair, mask=rotated, other=1.0)
        sine = tl.load(sines + position * HALF + pair, mask=rotated, other=0.0)
        return cosine, sine
    else:
        return 1.0, 0.0


def qk_norm_kind(layer: DeviceLayer) -> Literal["none", "head", "full"]:
    return "none" if layer.q_norm is None else layer.spec.mixer.qk_norm_scope


def reference(
    x: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    gain: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """fp32 [T, heads, D] with angles [T, HALF] -> normed over D where there is a gain, and rotated."""
    if gain is not None:
        x = torch.nn.functional.rms_norm(x, x.shape[-1:], gain, eps)
    half = cosine.shape[-1]
    cosine, sine = cosine[:, None], sine[:, None]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], -1)
