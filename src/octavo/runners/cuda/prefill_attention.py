"""Causal attention of a chunk's queries over one sequence's paged keys and values, in one pass (flash).

The chunk's own keys and values are already in the pages (`rotate`). A CTA is (BQ queries, query head).
Contract: q [T, H D], pages (`kv_cache`), of its type or int8, -> out [T, WIDTH] in it, columns past H D
left alone. Shape letters: T tokens, H query heads, KH kv heads, D head dim, DP its power of two, BQ queries and
BT tokens at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.models.spec import Attention
from octavo.runners.cuda.activation import tanh
from octavo.runners.cuda.kv_cache import LayerCache, as_operand, load_tokens

_LOG2_E = tl.constexpr(1.4426950408889634)
_HIDDEN = tl.constexpr(-1e30)


@triton.jit(do_not_specialize=["T", "start"])
def prefill_attention_kernel(
    q, keys, values, table, out, T, start, scale, softcap,
    H: tl.constexpr, KH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, WIDTH: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BQ: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Grid: (ceil(T / BQ), H). The last queries, which see most, go first."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    kv_head = head // (H // KH)
    query = block * BQ + tl.arange(0, BQ)
    dim = tl.arange(0, DP)
    place = query[:, None].to(tl.int64) * (H * D) + head * D + dim[None, :]
    inside = (query[:, None] < T) & (dim[None, :] < D)
    turned = tl.load(q + place, mask=inside, other=0.0)
    position = start + query
    end = tl.minimum(start + block * BQ + BQ, start + T)
    begin = start * 0
    if WINDOW > 0:
        begin = tl.maximum(start + block * BQ + 1 - WINDOW, 0) // BT * BT
    most = tl.full((BQ,), _HIDDEN, tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    mixed = tl.zeros((BQ, DP), tl.float32)
    for at in tl.range(begin, end, BT):
        token = at + tl.arange(0, BT)
        # A window's old pages may have been handed back: their place in the table says -1, and what another
        # sequence put there is not even read, since a weight of zero times NaN is NaN.
        page = tl.load(table + token // 32, mask=token < end, other=-1).to(tl.int64)
        k, k_scale = load_tokens(keys, page, token, page >= 0, kv_head, dim[None, :], KH, D)
        score = tl.dot(turned, tl.trans(k.to(turned.dtype))) * scale * k_scale[None, :]
        if SOFTCAP:
            score = softcap * tanh(score / softcap)
        seen = token[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (token[None, :] > position[:, None] - WINDOW)
        score = tl.where(seen, score * _LOG2_E, _HIDDEN)
        higher = tl.maximum(most, tl.max(score, 1))
        weight = tl.where(seen, tl.exp2(score - higher[:, None]), 0.0)
        shrink = tl.exp2(most - higher)
        total = total * shrink + tl.sum(weight, 1)
        v, v_scale = load_tokens(values, page, token, page >= 0, kv_head, dim[None, :], KH, D)
        weight = as_operand(weight * v_scale[None, :], values)
        mixed = mixed * shrink[:, None] + tl.dot(weight, v.to(weight.dtype))
        most = higher
    mixed = mixed / tl.maximum(total, 1e-30)[:, None]
    place = query[:, None].to(tl.int64) * WIDTH + head * D + dim[None, :]
    tl.store(out + place, mixed.to(out.dtype.element_ty), mask=inside)


def prefill_attention(
    mixer: Attention, cache: LayerCache, q: torch.Tensor, table: torch.Tensor, out: torch.Tensor, start: int
) -> None:
    """Launch it; `table` int32 [pages of the sequence], q [T, H D] at positions start.., out [T, WIDTH]."""
    tokens = q.shape[0]
    wide = mixer.head_dim > 128
    queries = 64 if tokens > 16 else 16
    prefill_attention_kernel[(triton.cdiv(tokens, queries), mixer.heads)](
        q,
        cache.keys,
        cache.values,
        table,
        out,
        tokens,
        start,
        mixer.scale,
        mixer.softcap or 1.0,
        H=mixer.heads,
        KH=mixer.kv_heads,
        D=mixer.head_dim,
        DP=max(16, triton.next_power_of_2(mixer.head_dim)),
        WIDTH=out.shape[1],
        WINDOW=mixer.window or 0,
        SOFTCAP=mixer.softcap is not None,
        BQ=queries,
        BT=32 if wide else 64,
        num_warps=4,
        num_stages=2,
    )
