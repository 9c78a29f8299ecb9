"""Attention of one new token of each of several sequences: what `decode_attention` does for one, at their speed.

A CTA is (kv head, split, sequence), a fixed number of them, so that a captured graph serves every length. It adds
the partial sums of its heads, turns them (`heads`), and walks its share of the old tokens the window shows, whose
keys and values are on their way several tiles ahead; the split that ends at the new token starts from it instead
of a tile, and appends it. Where new keys and values are in the pages already (`append_rows`), they are a tile's as
the old ones.

Contract: qkv fp32 [P, B, (H + 2 KH) D], pages (`kv_cache`) -> parts fp32 [B, S, H, D] and their base-2
log-sum-exp [B, S, H]; `join_splits` -> planes (`fixed_point`) or values [B, C], zeros past H D.
Shape letters: B sequences, P partial sums, S splits, H query heads, KH kv heads, G = H / KH, D head dim,
C padded columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.models.spec import Attention
from octavo.runners.cuda.activation import tanh
from octavo.runners.cuda.decode_attention import Sequences, visible
from octavo.runners.cuda.device_model import DeviceLayer
from octavo.runners.cuda.fixed_point import Planes, store_planes
from octavo.runners.cuda.heads import load_angles, load_heads, load_sum, qk_norm_kind
from octavo.runners.cuda.kv_cache import (
    LayerCache,
    as_operand,
    as_stored,
    load_tokens,
    store_token,
)
from octavo.runners.cuda.ptx import release_dependents, wait_for_inputs

_LOG2_E = tl.constexpr(1.4426950408889634)
_HIDDEN = tl.constexpr(-1e30)


@triton.jit
def _base_2(score, softcap, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        score = softcap * tanh(score / softcap)
    return score * _LOG2_E


@triton.jit(do_not_specialize=["table_stride"])
def batch_attention_kernel(
    qkv, keys, values, tables, slots, positions, cosines, sines, q_gain, k_gain, parts, sums, table_stride,
    qk_eps, scale, softcap,
    H: tl.constexpr, KH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GP: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr, Q_P2: tl.constexpr, K_P2: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    CT: tl.constexpr, S: tl.constexpr, P: tl.constexpr, APPENDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: B KH S. APPENDED: the new token's key and value are in the pages."""
    release_dependents(PDL)
    G: tl.constexpr = H // KH
    cta = tl.program_id(0)
    kv_head = cta % KH
    split = (cta // KH) % S
    sequence = cta // (KH * S)
    qkv_stride = tl.num_programs(0) // (KH * S) * ((H + 2 * KH) * D)
    slot = tl.load(slots + sequence)
    position = tl.load(positions + slot)
    table = tables + slot * table_stride
    low, tile, tiles = visible(position, CT, WINDOW)
    share = (tiles + S - 1) // S
    end = position + 1 if APPENDED else position
    first = tile + split * share
    last = tl.minimum(first + share, tile + tiles)
    if first < last:
        dim = tl.arange(0, DP)[None, :]
        real = dim < D
        cosine, sine = load_angles(cosines, sines, position, dim, HALF)
        wait_for_inputs(PDL)
        group = tl.arange(0, GP)[:, None]
        one = tl.arange(0, 1)[:, None]
        row = qkv + sequence * ((H + 2 * KH) * D)
        head = kv_head * G + group
        q = load_heads(
            row, head * D, q_gain, head * D if NORM == "full" else head * 0, dim, (group < G) & real,
            cosine, sine, qk_eps, qkv_stride, D, HALF, NORM, H * D, Q_P2, P,
        )  # fmt: skip
        q = as_operand(q, keys)
        most = tl.full((GP,), _HIDDEN, tl.float32)
        total = tl.zeros((GP,), tl.float32)
        mixed = tl.zeros((GP, DP), tl.float32)
        if (not APPENDED) and last == tile + tiles:
            new_k = load_heads(
                row + H * D, kv_head * D + one, k_gain, kv_head * D + one if NORM == "full" else one, dim,
                (one >= 0) & real, cosine, sine, qk_eps, qkv_stride, D, HALF, NORM, KH * D, K_P2, P,
            )  # fmt: skip
            new_v = load_sum(row + (H + KH + kv_head) * D + dim, real, qkv_stride, P)
            new_k, k_scale = as_stored(new_k, keys)
            new_v, v_scale = as_stored(new_v, values)
            page = tl.load(table + position // 32).to(tl.int64)
            store_token(keys, page, position, new_k, k_scale, kv_head, dim, KH, D)
            store_token(values, page, position, new_v, v_scale, kv_head, dim, KH, D)
            score = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), 1) * scale * k_scale
            most = _base_2(score, softcap, SOFTCAP)
            total += 1.0
            mixed += new_v.to(tl.float32) * v_scale[:, None]
        for at in tl.range(first, last):
            token = at * CT + tl.arange(0, CT)
            old = (token >= low) & (token < end)
            if CT <= 32:  # of one page, which the loop knows before its tokens
                page = tl.load(table + at * CT // 32, mask=at * CT < end, other=0).to(tl.int64)
            else:
                page = tl.load(table + token // 32, mask=old, other=0).to(tl.int64)
            k, k_scale = load_tokens(keys, page, token, old, kv_head, dim, KH, D)
            v, v_scale = load_tokens(values, page, token, old, kv_head, dim, KH, D)
            score = tl.dot(q, tl.trans(k.to(q.dtype))) * scale * k_scale[None, :]
            score = _base_2(score, softcap, SOFTCAP)
            score = tl.where(old[None, :], score, _HIDDEN)
            higher = tl.maximum(most, tl.max(score, 1))
            weight = tl.exp2(score - higher[:, None])
            shrink = tl.exp2(most - higher)
            total = total * shrink + tl.sum(weight, 1)
            weight = as_operand(weight * v_scale[None, :], values)
            mixed = mixed * shrink[:, None] + tl.dot(weight, v.to(weight.dtype))
            most = higher
        heads = kv_head * G + tl.arange(0, GP)
        out = (sequence * S + split) * H + heads
        inside = tl.arange(0, GP) < G
        tl.store(parts + out[:, None] * D + dim, mixed / total[:, None], mask=inside[:, None] & real)
        tl.store(sums + out, most + tl.log2(total), mask=inside)
    else:
        wait_for_inputs(PDL)


@triton.jit
def join_splits_kernel(
    parts, sums, slots, positions, out, out_scales,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, S: tl.constexpr, WINDOW: tl.constexpr, CT: tl.constexpr,
    BLOCKS: tl.constexpr, XB: tl.constexpr, UNROLLED: tl.constexpr, PLANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (ceil(C / (BLOCKS XB)), B). Splits weighted by their sums, a head's at each of its columns."""
    release_dependents(PDL)
    sequence = tl.program_id(1).to(tl.int64)
    position = tl.load(positions + tl.load(slots + sequence))
    _, _, tiles = visible(position, CT, WINDOW)
    share = (tiles + S - 1) // S
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * XB + tl.arange(0, XB)[None, :]
    valid = column < H * D
    wait_for_inputs(PDL)
    most = tl.full((BLOCKS, XB), _HIDDEN, tl.float32)
    for split in tl.range(0, S, loop_unroll_factor=UNROLLED):
        place = (sequence * S + split) * H + column // D
        most = tl.maximum(most, tl.load(sums + place, mask=valid & (split * share < tiles), other=_HIDDEN))
    total = tl.zeros((BLOCKS, XB), tl.float32)
    mixed = tl.zeros((BLOCKS, XB), tl.float32)
    for split in tl.range(0, S, loop_unroll_factor=UNROLLED):
        used = valid & (split * share < tiles)
        place = (sequence * S + split) * H
        weight = tl.exp2(tl.load(sums + place + column // D, mask=used, other=_HIDDEN) - most)
        weight = tl.where(used, weight, 0.0)
        total += weight
        mixed += weight * tl.load(parts + place * D + column, mask=used, other=0.0)
    mixed = mixed / tl.where(valid, total, 1.0)
    if PLANES:
        store_planes(
            out + sequence * (2 * C),
            out_scales + sequence * ((C + XB - 1) // XB),
            block,
            column,
            mixed,
            C,
            XB,
        )
    else:
        tl.store(out + sequence * C + column, mixed.to(out.dtype.element_ty), mask=column < C)


@dataclass(frozen=True, slots=True)
class WalkTile:
    """How sequences are walked."""

    tokens: int
    """At once: a tile."""
    splits: int
    """Shares of a length."""
    stages: int
    """Tiles on their way."""
    warps: int


def walk_tile_for(mixer: Attention, sequences: int, context_tokens: int, multiprocessors: int) -> WalkTile:
    """About two CTAs a multiprocessor, four where half a tile is enough (measured with heads of 128 on an H100), and no
    more splits than a context has tiles."""
    heads = sequences * mixer.kv_heads
    half = 64 < mixer.head_dim <= 128 and heads >= multiprocessors
    tokens = 32 if half or mixer.head_dim > 128 else 64
    wanted = max(1, (4 if half else 2) * multiprocessors // heads)
    most = triton.next_power_of_2(triton.cdiv(context_tokens, tokens))
    splits = min(64, 1 << (wanted.bit_length() - 1), most)
    return WalkTile(tokens, splits, 4 if half else 3, 4)


def batch_attention(
    layer: DeviceLayer,
    cache: LayerCache,
    qkv: torch.Tensor,
    sequences: Sequences,
    parts: torch.Tensor,
    sums: torch.Tensor,
    out: Planes | torch.Tensor,
    tile: WalkTile,
    *,
    appended: bool = False,
    pdl: bool,
) -> None:
    """Launch both kernels: qkv fp32 [P, B, (H + 2 KH) D], contiguous, -> out; parts and sums hold [B, S, H, D] fp32."""
    mixer = layer.spec.mixer
    partial, count, _ = qkv.shape
    dims = max(16, triton.next_power_of_2(mixer.head_dim))
    table = sequences.tables[cache.group]
    unused = qkv
    batch_attention_kernel[(count * mixer.kv_heads * tile.splits,)](
        qkv,
        cache.keys,
        cache.values,
        table,
        sequences.slots,
        sequences.positions,
        unused if layer.cosines is None else layer.cosines,
        unused if layer.sines is None else layer.sines,
        unused if layer.q_norm is None else layer.q_norm.gain,
        unused if layer.k_norm is None else layer.k_norm.gain,
        parts,
        sums,
        table.shape[1],
        0.0 if layer.q_norm is None else layer.q_norm.eps,
        mixer.scale,
        mixer.softcap or 1.0,
        H=mixer.heads,
        KH=mixer.kv_heads,
        D=mixer.head_dim,
        DP=dims,
        GP=max(16, triton.next_power_of_2(mixer.heads // mixer.kv_heads)),
        HALF=0 if mixer.rope is None else mixer.rope.rotary_dim // 2,
        NORM=qk_norm_kind(layer),
        Q_P2=triton.next_power_of_2(mixer.heads * mixer.head_dim),
        K_P2=triton.next_power_of_2(mixer.kv_heads * mixer.head_dim),
        WINDOW=mixer.window or 0,
        SOFTCAP=mixer.softcap is not None,
        CT=tile.tokens,
        S=tile.splits,
        P=partial,
        APPENDED=appended,
        PDL=pdl,
        num_warps=tile.warps,
        num_stages=tile.stages,
        launch_pdl=pdl,
    )
    _join_splits(mixer, sequences, parts, sums, out, tile, pdl=pdl)


def _join_splits(
    mixer: Attention,
    sequences: Sequences,
    parts: torch.Tensor,
    sums: torch.Tensor,
    out: Planes | torch.Tensor,
    tile: WalkTile,
    *,
    pdl: bool,
) -> None:
    planes = out if isinstance(out, Planes) else None
    values = out.pairs if isinstance(out, Planes) else out
    columns = values.shape[-1]
    block = 64 if planes is None else planes.block_width
    blocks = max(1, min(512 // block, triton.next_power_of_2(triton.cdiv(columns, block))))
    grid = (triton.cdiv(columns, blocks * block), values.shape[0])
    join_splits_kernel[grid](
        parts,
        sums,
        sequences.slots,
        sequences.positions,
        values,
        parts if planes is None else planes.scales,
        H=mixer.heads,
        D=mixer.head_dim,
        C=columns,
        S=tile.splits,
        WINDOW=mixer.window or 0,
        CT=tile.tokens,
        BLOCKS=blocks,
        XB=block,
        PLANES=planes is not None,
        PDL=pdl,
        # All splits at once would spill where a row is a block, for which the driver sets gigabytes aside.
        UNROLLED=max(1, min(8, tile.splits, 16384 // (blocks * block))),
        num_warps=max(4, min(16, block // 256)),
        launch_pdl=pdl,
    )
