"""Paged keys and values on the device, and their reads and writes. A page is one piece of 32 tokens.

Only `append_rows`, which knows pages of 16 bits alone, writes for itself.

In 16 bits [pages, KH, 32, D]. In int8 [pages, KH, 32 D + 128]: a kv head's codes, then an fp32 scale for each token,
so that key = code * scale with an error of at most scale / 2 = max|key| / 254. Scales are left to the readers: they
multiply a score or a weight, not D elements.
Shape letters: CT tokens, KH kv heads, D head dim, DP the power of two at or above it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.dtypes import KV_SCALE_BYTES
from octavo.models.spec import KV_PAGE_TOKENS, ModelSpec
from octavo.runners.cuda.fixed_point import magnitude, quantize
from octavo.runners.cuda.ptx import INTERPRETED


@dataclass(frozen=True, slots=True)
class LayerCache:
    keys: torch.Tensor
    values: torch.Tensor
    group: int
    """Which of `ModelSpec.kv_groups` the layer is in, i.e. which page table it reads."""


def make_cache(
    spec: ModelSpec, pages: Sequence[int], dtype: torch.dtype, device: torch.device
) -> tuple[LayerCache, ...]:
    """One a layer. Zeroed: what a kernel reads beside the tokens it wants must be numbers."""
    caches: dict[int, LayerCache] = {}
    for index, (group, count) in enumerate(zip(spec.kv_groups, pages, strict=True)):
        for layer in group.layers:
            mixer = spec.layers[layer].mixer
            keys = torch.zeros(
                pages_shape(count, mixer.kv_heads, mixer.head_dim, dtype), dtype=dtype, device=device
            )
            caches[layer] = LayerCache(keys, torch.zeros_like(keys), index)
    return tuple(caches[layer] for layer in range(len(spec.layers)))


def pages_shape(pages: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[int, ...]:
    if dtype == torch.int8:
        return pages, kv_heads, KV_PAGE_TOKENS * (head_dim + KV_SCALE_BYTES)
    return pages, kv_heads, KV_PAGE_TOKENS, head_dim


_BESIDE_CODES = tl.constexpr(tl.float16 if INTERPRETED.value else tl.bfloat16)
"""bf16 has the range that weights times scales need; Triton 3.6 multiplies its bits when interpreted."""


@triton.jit
def as_operand(values, pages):
    """In the type that is multiplied with what the pages hold."""
    if pages.dtype.element_ty == tl.int8:
        return values.to(_BESIDE_CODES)
    else:
        return values.to(pages.dtype.element_ty)


@triton.jit
def load_tokens(pages, page, token, exists, kv_head, dim, KH: tl.constexpr, D: tl.constexpr):
    """Tokens [CT] of `page`, one or one each: as stored [CT, DP], and scales fp32 [CT]; zeros where not `exists`."""
    mask = exists[:, None] & (dim < D)
    if pages.dtype.element_ty == tl.int8:
        head = (page * KH + kv_head) * (32 * D + 128)
        codes = tl.load(pages + (head + token % 32 * D)[:, None] + dim, mask=mask, other=0)
        scales = (pages + head + 32 * D).to(tl.pointer_type(tl.float32))
        return codes, tl.load(scales + token % 32, mask=exists, other=0.0)
    else:
        place = ((page * KH + kv_head) * 32 + token % 32)[:, None] * D + dim
        return tl.load(pages + place, mask=mask, other=0.0), tl.full(token.shape, 1.0, tl.float32)


@triton.jit
def as_stored(value, pages):
    """fp32 [1, DP] -> what `pages` hold of it [1, DP], and its scale fp32 [1]: none where it has no number in it."""
    if pages.dtype.element_ty == tl.int8:
        largest = tl.maximum(tl.max(magnitude(value), 1), 1e-30)
        scale = tl.where(largest < float("inf"), largest * (1.0 / 127.0), float("nan"))
        return quantize(value, (127.0 / largest)[:, None]).to(tl.int8), scale
    else:
        return value.to(pages.dtype.element_ty), tl.full((1,), 1.0, tl.float32)


@triton.jit
def store_token(pages, page, position, stored, scale, kv_head, dim, KH: tl.constexpr, D: tl.constexpr):
    """`as_stored`'s value and scale of one token into its `page`."""
    if pages.dtype.element_ty == tl.int8:
        head = pages + (page * KH + kv_head) * (32 * D + 128)
        tl.store(head + position % 32 * D + dim, stored, mask=dim < D)
        scales = (head + 32 * D).to(tl.pointer_type(tl.float32))
        tl.store(scales + position % 32 + tl.arange(0, 1), scale)
    else:
        place = ((page * KH + kv_head) * 32 + position % 32) * D + dim
        tl.store(pages + place, stored, mask=dim < D)


def reference(pages: torch.Tensor, head_dim: int) -> torch.Tensor:
    """All pages -> fp32 [pages, KH, 32, D]."""
    if pages.dtype != torch.int8:
        return pages.float()
    codes = pages[..., : KV_PAGE_TOKENS * head_dim].unflatten(-1, (KV_PAGE_TOKENS, head_dim))
    scales = pages[..., KV_PAGE_TOKENS * head_dim :].contiguous().view(torch.float32)
    return torch.mul(codes, scales[..., None])
