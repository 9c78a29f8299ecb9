"""New keys and values of many rows into their pages, before any row attends: rows of one prompt see each other.

Contract: qkv fp32 [P, B, (H + 2 KH) D] -> rows of the pages [pages, KH, 32, D] at each row's slot and position.
Shape letters: B rows, P partial sums, H query heads, KH kv heads, D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.runners.cuda.decode_attention import Sequences
from octavo.runners.cuda.device_model import DeviceLayer
from octavo.runners.cuda.heads import load_angles, load_heads, load_sum, qk_norm_kind
from octavo.runners.cuda.kv_cache import LayerCache
from octavo.runners.cuda.ptx import release_dependents, wait_for_inputs


@triton.jit(do_not_specialize=["table_stride", "qkv_stride"])
def append_rows_kernel(
    qkv, keys, values, tables, slots, positions, cosines, sines, k_gain, table_stride, qkv_stride, qk_eps,
    H: tl.constexpr, KH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr, K_P2: tl.constexpr, P: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (B, KH)."""
    release_dependents(PDL)
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    slot = tl.load(slots + sequence)
    position = tl.load(positions + slot)
    dim = tl.arange(0, DP)[None, :]
    one = tl.arange(0, 1)[:, None]
    real = (one >= 0) & (dim < D)
    cosine, sine = load_angles(cosines, sines, position, dim, HALF)
    page = tl.load(tables + slot * table_stride + position // 32).to(tl.int64)
    wait_for_inputs(PDL)
    row = qkv + sequence * ((H + 2 * KH) * D)
    k = load_heads(
        row + H * D, kv_head * D + one, k_gain, kv_head * D + one if NORM == "full" else one, dim, real,
        cosine, sine, qk_eps, qkv_stride, D, HALF, NORM, KH * D, K_P2, P,
    )  # fmt: skip
    v = load_sum(row + (H + KH + kv_head) * D + dim, real, qkv_stride, P)
    place = ((page * KH + kv_head) * 32 + position % 32) * D + dim
    tl.store(keys + place, k.to(keys.dtype.element_ty), mask=real)
    tl.store(values + place, v.to(values.dtype.element_ty), mask=real)


def append_rows(
    layer: DeviceLayer, cache: LayerCache, qkv: torch.Tensor, sequences: Sequences, *, pdl: bool
) -> None:
    """Launch it."""
    mixer = layer.spec.mixer
    partial, count, _ = qkv.shape
    table = sequences.tables[cache.group]
    append_rows_kernel[(count, mixer.kv_heads)](
        qkv,
        cache.keys,
        cache.values,
        table,
        sequences.slots,
        sequences.positions,
        qkv if layer.cosines is None else layer.cosines,
        qkv if layer.sines is None else layer.sines,
        qkv if layer.k_norm is None else layer.k_norm.gain,
        table.shape[1],
        qkv.stride(0),
        0.0 if layer.k_norm is None else layer.k_norm.eps,
        H=mixer.heads,
        KH=mixer.kv_heads,
        D=mixer.head_dim,
        DP=max(16, triton.next_power_of_2(mixer.head_dim)),
        HALF=0 if mixer.rope is None else mixer.rope.rotary_dim // 2,
        NORM=qk_norm_kind(layer),
        K_P2=triton.next_power_of_2(mixer.kv_heads * mixer.head_dim),
        P=partial,
        PDL=pdl,
        num_warps=1,
        launch_pdl=pdl,
    )
