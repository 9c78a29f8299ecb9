"""Activations of the feed-forward block, exactly as torch defines them, without calls into libdevice."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Right at both ends: exp overflows to infinity, and 2 / infinity is 0."""
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def activate(x, KIND: tl.constexpr):
    """silu, gelu or gelu_tanh of an fp32 tensor."""
    if KIND == "silu":
        return x / (1.0 + tl.exp(-x))
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
