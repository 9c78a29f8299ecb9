"""All inline assembly, each function with a twin in plain Triton that the interpreter runs instead.

The twins compute the same bits; on a card tests/gpu compares them. What only orders or hints (programmatic
dependent launch, prefetches) is nothing when interpreted.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dp4a(a, b, c):
    """c + the sum of four products of signed bytes; int32 tensors."""
    if INTERPRETED:
        return dp4a_twin(a, b, c)
    else:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def dp4a_twin(a, b, c):
    for byte in tl.static_range(4):
        c += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
    return c


@triton.jit
def permute_bytes(a, b, selector):
    """Byte j of the result is the one of b:a that nibble j of `selector` counts, 0..7; upper 16 bits: ignored."""
    if INTERPRETED:
        return permute_bytes_twin(a, b, selector)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def permute_bytes_twin(a, b, selector):
    result = a * 0 + b * 0 + selector * 0
    for byte in tl.static_range(4):
        chosen = (selector >> (4 * byte)) & 7
        word = tl.where(chosen < 4, a, b)
        result |= ((word >> (chosen % 4 * 8)) & 255) << (8 * byte)
    return result


@triton.jit
def opaque(a):
    """a, of which the compiler knows nothing: a load at such an index is not vectorized.

    A vectorized load of scales gets another layout than the weights beside it, and the loop a shuffle.
    """
    if INTERPRETED:
        return a
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [a], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def prefetch_l2(pointers):
    """Start fetching the 128-byte lines at int64 addresses into the L2 cache; they must be mapped."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
            "=r,l",
            [pointers],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def release_dependents(PDL: tl.constexpr):
    """The next kernel of the stream may start; it sees our writes only after its own `wait_for_inputs`."""
    if PDL and not INTERPRETED:
        gdc_launch_dependents()


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Wait until the kernels before are done and their writes are visible.

    Every kernel of a chain calls it in every CTA, or being done would not be transitive.
    """
    if PDL and not INTERPRETED:
        gdc_wait()
