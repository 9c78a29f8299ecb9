"""Gumbel noise of the sampling law: a function of seed, choice, position and token alone.

Philox4x32-10 is Triton's, with the law's key and counter; one call gives the words of four tokens in a row.
Its reference is `runners.reference.sampling.gumbel_noise`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def random_words(first, position, seed_low, seed_high, choice, COUNT: tl.constexpr):
    """uint32 [COUNT] of the tokens from `first` on, a multiple of 4; scalars int32 that hold 32-bit words."""
    block = first // 4 + tl.arange(0, COUNT // 4)
    key = (choice.to(tl.int64) << 32) | (seed_low.to(tl.int64) & 0xFFFFFFFF)
    w0, w1, w2, w3 = tl.philox(key, block, block * 0 + position, block * 0 + seed_high, block * 0)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (COUNT,))


@triton.jit
def gumbel(words):
    """32 random bits -> standard Gumbel noise, fp32, within 4e-6 of its exact value."""
    v = tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # log1p(-v) without the libraries' function: the error of u = 1 - v cancels in log(u) / (u - 1).
    u = 1.0 - v
    gap = tl.where(u == 1.0, 1.0, u - 1.0)
    exponential = tl.where(u == 1.0, v, tl.log(u) * tl.math.div_rn(v, gap))
    return -tl.log(exponential)
