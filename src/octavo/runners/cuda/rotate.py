"""Queries, keys and values of many tokens: norm and rotation (`heads`), q to a buffer, k and v into their pages.

Contract: qkv [T, (H + 2 KH) D] of one sequence's consecutive tokens at `start`.. -> q [T, H D] in the type of
`q`, and rows of the pages [pages, KH, 32, D]. Shape letters: T tokens, H query heads, KH kv heads, D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.runners.cuda.device_model import DeviceLayer
from octavo.runners.cuda.heads import load_angles, load_heads, qk_norm_kind
from octavo.runners.cuda.kv_cache import LayerCache


@triton.jit(do_not_specialize=["start"])
def rotate_kernel(
    qkv, q, keys, values, table, cosines, sines, q_gain, k_gain, start, qk_eps,
    H: tl.constexpr, KH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr, Q_P2: tl.constexpr, K_P2: tl.constexpr,
):  # fmt: skip
    """Grid: (T, H + 2 KH)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = start + tl.program_id(0)
    dim = tl.arange(0, DP)[None, :]
    one = tl.arange(0, 1)[:, None]
    valid = (one >= 0) & (dim < D)
    cosine, sine = load_angles(cosines, sines, position, dim, HALF)
    row = qkv + token * ((H + 2 * KH) * D)
    if head < H:
        value = load_heads(
            row, head * D + one, q_gain, head * D + one if NORM == "full" else one, dim, valid,
            cosine, sine, qk_eps, 0, D, HALF, NORM, H * D, Q_P2, 1,
        )  # fmt: skip
        tl.store(q + token * (H * D) + head * D + dim, value.to(q.dtype.element_ty), mask=valid)
    else:
        page = tl.load(table + position // 32).to(tl.int64)
        if head < H + KH:
            kv_head = head - H
            value = load_heads(
                row + H * D, kv_head * D + one, k_gain, kv_head * D + one if NORM == "full" else one, dim,
                valid, cosine, sine, qk_eps, 0, D, HALF, NORM, KH * D, K_P2, 1,
            )  # fmt: skip
            place = ((page * KH + kv_head) * 32 + position % 32) * D + dim
            tl.store(keys + place, value.to(keys.dtype.element_ty), mask=valid)
        else:
            kv_head = head - H - KH
            value = tl.load(row + head * D + dim, mask=valid, other=0.0).to(tl.float32)
            place = ((page * KH + kv_head) * 32 + position % 32) * D + dim
            tl.store(values + place, value.to(values.dtype.element_ty), mask=valid)


def rotate(
    layer: DeviceLayer, cache: LayerCache, qkv: torch.Tensor, q: torch.Tensor, table: torch.Tensor, start: int
) -> None:
    """Launch it; `table` int32 [pages of the sequence]."""
    mixer = layer.spec.mixer
    norm = qk_norm_kind(layer)
    unused = qkv
    rotate_kernel[(qkv.shape[0], mixer.heads + 2 * mixer.kv_heads)](
        qkv,
        q,
        cache.keys,
        cache.values,
        table,
        unused if layer.cosines is None else layer.cosines,
        unused if layer.sines is None else layer.sines,
        unused if layer.q_norm is None else layer.q_norm.gain,
        unused if layer.k_norm is None else layer.k_norm.gain,
        start,
        0.0 if layer.q_norm is None else layer.q_norm.eps,
        H=mixer.heads,
        KH=mixer.kv_heads,
        D=mixer.head_dim,
        DP=max(16, triton.next_power_of_2(mixer.head_dim)),
        HALF=0 if mixer.rope is None else mixer.rope.rotary_dim // 2,
        NORM=norm,
        Q_P2=triton.next_power_of_2(mixer.heads * mixer.head_dim),
        K_P2=triton.next_power_of_2(mixer.kv_heads * mixer.head_dim),
        num_warps=1,
    )
