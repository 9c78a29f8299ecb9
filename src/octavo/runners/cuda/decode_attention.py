"""Attention of one new token a sequence over its paged keys and values, split over the length.

A CTA is (split, kv head, sequence): it turns the new query heads and the new key (`heads`), walks its share of
the tokens the window shows, and leaves an unnormalized part; the split that owns the new token also appends its
key and value. Old keys and values are loaded before the wait for the new ones. The number of CTAs is fixed,
so a captured graph serves every length. CTAs past those fetch the next linears' weights into the L2 cache,
since this kernel leaves the memory idle.

Contract: qkv fp32 [B, (H + 2 KH) D], pages (`kv_cache`) -> parts fp32 [B, S, H, D] and their base-2
log-sum-exp [B, S, H]; `combine_kernel` -> [B, H D] in one of gemv's input forms: planes, shuffled or in order.
Shape letters: B sequences, S splits, H query heads, KH kv heads, G = H / KH, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.models.spec import Attention
from octavo.runners.cuda.activation import tanh
from octavo.runners.cuda.device_model import DeviceLayer
from octavo.runners.cuda.fixed_point import Planes, store_planes
from octavo.runners.cuda.gemv_inputs import shuffled_place
from octavo.runners.cuda.heads import load_angles, load_heads, qk_norm_kind
from octavo.runners.cuda.kv_cache import (
    LayerCache,
    as_operand,
    as_stored,
    load_tokens,
    store_token,
)
from octavo.runners.cuda.ptx import prefetch_l2, release_dependents, wait_for_inputs

_LOG2_E = tl.constexpr(1.4426950408889634)
_HIDDEN = tl.constexpr(-1e30)


@triton.jit
def _load_tokens(
    pages, table, first, low, position, kv_head, dim, KH: tl.constexpr, D: tl.constexpr, CT: tl.constexpr
):  # fmt: skip
    """CT tokens from `first` of one kv head [CT, DP], and their scales: those in [low, position), zeros elsewhere."""
    token = first + tl.arange(0, CT)
    old = (token >= low) & (token < position)
    page = tl.load(table + token // 32, mask=old, other=0).to(tl.int64)
    return load_tokens(pages, page, token, old, kv_head, dim, KH, D)


@triton.jit
def visible(position, CT: tl.constexpr, WINDOW: tl.constexpr):
    """First visible token, its tile of CT tokens, and how many tiles there are to the new token's."""
    low = tl.maximum(position + 1 - WINDOW, 0) if WINDOW > 0 else position * 0
    return low, low // CT, position // CT - low // CT + 1


@triton.jit(do_not_specialize=["lines_a", "lines_b", "table_stride"])
def decode_attention_kernel(
    qkv, keys, values, tables, slots, positions, cosines, sines, q_gain, k_gain, parts, sums,
    prefetch_a, lines_a, prefetch_b, lines_b, table_stride, qk_eps, scale, softcap,
    B: tl.constexpr, H: tl.constexpr, KH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GP: tl.constexpr,
    HALF: tl.constexpr, NORM: tl.constexpr, Q_P2: tl.constexpr, K_P2: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, CT: tl.constexpr, S: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: B KH S, and ceil((lines_a + lines_b) / LINES) more that only prefetch lines of 128 bytes."""
    release_dependents(PDL)
    cta = tl.program_id(0)
    if cta >= B * KH * S:
        line = (cta - B * KH * S) * LINES + tl.arange(0, LINES)
        a = prefetch_a.to(tl.int64) + tl.minimum(line, lines_a - 1).to(tl.int64) * 128
        b = prefetch_b.to(tl.int64) + tl.minimum(line - lines_a, lines_b - 1).to(tl.int64) * 128
        prefetch_l2(tl.where(line < lines_a, a, b))
        wait_for_inputs(PDL)
    else:
        G: tl.constexpr = H // KH
        kv_head = cta % KH
        split = (cta // KH) % S
        sequence = cta // (KH * S)
        slot = tl.load(slots + sequence)
        position = tl.load(positions + slot)
        table = tables + slot * table_stride
        low, tile, tiles = visible(position, CT, WINDOW)
        share = (tiles + S - 1) // S
        first = tile + split * share
        last = tl.minimum(first + share, tile + tiles)
        if first < last:
            dim = tl.arange(0, DP)[None, :]
            k, k_scale = _load_tokens(keys, table, first * CT, low, position, kv_head, dim, KH, D, CT)
            v, v_scale = _load_tokens(values, table, first * CT, low, position, kv_head, dim, KH, D, CT)
            cosine, sine = load_angles(cosines, sines, position, dim, HALF)
            wait_for_inputs(PDL)

            group = tl.arange(0, GP)[:, None]
            one = tl.arange(0, 1)[:, None]
            row = qkv + sequence * ((H + 2 * KH) * D)
            head = kv_head * G + group
            q = load_heads(
                row, head * D, q_gain, head * D if NORM == "full" else head * 0, dim, (group < G) & (dim < D),
                cosine, sine, qk_eps, 0, D, HALF, NORM, H * D, Q_P2, 1,
            )  # fmt: skip
            new_k = load_heads(
                row + H * D, kv_head * D + one, k_gain, kv_head * D + one if NORM == "full" else one, dim,
                (one >= 0) & (dim < D), cosine, sine, qk_eps, 0, D, HALF, NORM, KH * D, K_P2, 1,
            )  # fmt: skip
            new_v = tl.load(row + (H + KH + kv_head) * D + dim, mask=dim < D, other=0.0)
            new_k, new_k_scale = as_stored(new_k, keys)
            new_v, new_v_scale = as_stored(new_v, values)
            if last == tile + tiles:
                page = tl.load(table + position // 32).to(tl.int64)
                store_token(keys, page, position, new_k, new_k_scale, kv_head, dim, KH, D)
                store_token(values, page, position, new_v, new_v_scale, kv_head, dim, KH, D)

            q = as_operand(q, keys)
            most = tl.full((GP,), _HIDDEN, tl.float32)
            total = tl.zeros((GP,), tl.float32)
            mixed = tl.zeros((GP, DP), tl.float32)
            for at in tl.range(first, last, num_stages=1):
                token = at * CT + tl.arange(0, CT)
                k = tl.where(token[:, None] == position, new_k, k)
                v = tl.where(token[:, None] == position, new_v, v)
                k_scale = tl.where(token == position, new_k_scale, k_scale)
                v_scale = tl.where(token == position, new_v_scale, v_scale)
                end = tl.where(at + 1 < last, position, 0)
                next_k, next_k_scale = _load_tokens(
                    keys, table, (at + 1) * CT, low, end, kv_head, dim, KH, D, CT
                )
                next_v, next_v_scale = _load_tokens(
                    values, table, (at + 1) * CT, low, end, kv_head, dim, KH, D, CT
                )
                score = tl.dot(q, tl.trans(k.to(q.dtype))) * scale * k_scale[None, :]
                if SOFTCAP:
                    score = softcap * tanh(score / softcap)
                seen = (token >= low) & (token <= position)
                score = tl.where(seen[None, :], score * _LOG2_E, _HIDDEN)
                higher = tl.maximum(most, tl.max(score, 1))
                weight = tl.exp2(score - higher[:, None])
                shrink = tl.exp2(most - higher)
                total = total * shrink + tl.sum(weight, 1)
                weight = as_operand(weight * v_scale[None, :], values)
                mixed = mixed * shrink[:, None] + tl.dot(weight, v.to(weight.dtype))
                most = higher
                k, k_scale = next_k, next_k_scale
                v, v_scale = next_v, next_v_scale
            heads = kv_head * G + tl.arange(0, GP)
            out = (sequence * S + split) * H + heads
            inside = tl.arange(0, GP) < G
            tl.store(parts + out[:, None] * D + dim, mixed / total[:, None], mask=inside[:, None] & (dim < D))
            tl.store(sums + out, most + tl.log2(total), mask=inside)
        else:
            wait_for_inputs(PDL)


@triton.jit
def combine_kernel(
    parts, sums, slots, positions, out, out_scales,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, S: tl.constexpr, WINDOW: tl.constexpr, CT: tl.constexpr,
    FORM: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: B H. Splits weighted by their sums; `out` has WIDTH columns. FORM planes: D is a multiple of 32."""
    release_dependents(PDL)
    head = tl.program_id(0) % H
    sequence = tl.program_id(0) // H
    position = tl.load(positions + tl.load(slots + sequence))
    _, _, tiles = visible(position, CT, WINDOW)
    share = (tiles + S - 1) // S
    split = tl.arange(0, S)
    used = split * share < tiles
    dim = tl.arange(0, DP)
    wait_for_inputs(PDL)
    place = (sequence * S + split) * H + head
    weight = tl.load(sums + place, mask=used, other=_HIDDEN)
    part = tl.load(
        parts + place[:, None] * D + dim[None, :], mask=used[:, None] & (dim[None, :] < D), other=0.0
    )
    weight = tl.exp2(weight - tl.max(weight, 0))
    mixed = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    column = head * D + dim
    if FORM == "planes":
        column = tl.reshape(tl.where(dim < D, column, WIDTH), (DP // 32, 32))
        value = tl.reshape(mixed, (DP // 32, 32))
        block = tl.arange(0, DP // 32)
        block = tl.where(block < D // 32, head * (D // 32) + block, WIDTH // 32)
        store_planes(
            out + sequence * (2 * WIDTH),
            out_scales + sequence * (WIDTH // 32),
            block,
            column,
            value,
            WIDTH,
            32,
        )
    else:
        if FORM == "shuffled":
            column = shuffled_place(column)
        tl.store(out + sequence * WIDTH + column, mixed.to(out.dtype.element_ty), mask=dim < D)


@dataclass(frozen=True, slots=True)
class Sequences:
    """Where decoding sequences stand, on the device: nothing of it is known when a graph is captured."""

    slots: torch.Tensor
    """int32 [B]: the slot of each row."""
    positions: torch.Tensor
    """int32 [slots]: of the token that is fed."""
    tables: tuple[torch.Tensor, ...]
    """For each KV group int32 [slots, pages of a context]."""
    spare_slot: int
    """Of rows that only fill up a batch: it stays where it is."""


@dataclass(frozen=True, slots=True)
class SplitTile:
    """How a sequence's length is cut: tokens at once, shares, warps of a share."""

    tokens: int
    splits: int
    warps: int


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Weights to have in the L2 cache when attention is over, in the order they are read."""

    first: torch.Tensor
    second: torch.Tensor
    most_second_bytes: int

    @property
    def lines(self) -> tuple[int, int]:
        return self.first.nbytes // 128, min(self.second.nbytes, self.most_second_bytes) // 128


_PREFETCH_LINES = 2048
"""Of a CTA; a fourth of that cost 1 % of a step of Llama-3.1-8B: CTAs that come and go stand in others' way."""


def fill_blocks(mixer: Attention) -> bool:
    """Whether no block of planes has columns of two heads."""
    return mixer.head_dim % 32 == 0


def split_tile_for(mixer: Attention, sequences: int, context_tokens: int, multiprocessors: int) -> SplitTile:
    """About two CTAs a multiprocessor, and no more splits than a context has tiles."""
    tokens = 32 if mixer.head_dim > 128 else 64
    wanted = max(1, 2 * multiprocessors // (sequences * mixer.kv_heads))
    splits = min(
        64, 1 << (wanted.bit_length() - 1), triton.next_power_of_2(triton.cdiv(context_tokens, tokens))
    )
    return SplitTile(tokens, splits, 8 if mixer.head_dim > 64 else 4)


def decode_attention(
    layer: DeviceLayer,
    cache: LayerCache,
    qkv: torch.Tensor,
    sequences: Sequences,
    parts: torch.Tensor,
    sums: torch.Tensor,
    out: torch.Tensor | Planes,
    tile: SplitTile,
    *,
    prefetch: Prefetch | None,
    shuffled: bool,
    pdl: bool,
) -> None:
    """Launch both kernels: qkv fp32 [B, (H + 2 KH) D] -> out; parts and sums hold [B, S, H, D] fp32.

    `out` [B, WIDTH], `shuffled` or in order; or planes of blocks of 32 columns, for head dims that `fill_blocks`.
    """
    mixer = layer.spec.mixer
    count = qkv.shape[0]
    group = mixer.heads // mixer.kv_heads
    lines_a, lines_b = (0, 0) if prefetch is None else prefetch.lines
    dims = max(16, triton.next_power_of_2(mixer.head_dim))
    table = sequences.tables[cache.group]
    unused = qkv
    ctas = count * mixer.kv_heads * tile.splits
    decode_attention_kernel[(ctas + triton.cdiv(lines_a + lines_b, _PREFETCH_LINES),)](
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
        unused if prefetch is None else prefetch.first,
        lines_a,
        unused if prefetch is None else prefetch.second,
        lines_b,
        table.shape[1],
        0.0 if layer.q_norm is None else layer.q_norm.eps,
        mixer.scale,
        mixer.softcap or 1.0,
        B=count,
        H=mixer.heads,
        KH=mixer.kv_heads,
        D=mixer.head_dim,
        DP=dims,
        GP=max(16, triton.next_power_of_2(group)),
        HALF=0 if mixer.rope is None else mixer.rope.rotary_dim // 2,
        NORM=qk_norm_kind(layer),
        Q_P2=triton.next_power_of_2(mixer.heads * mixer.head_dim),
        K_P2=triton.next_power_of_2(mixer.kv_heads * mixer.head_dim),
        WINDOW=mixer.window or 0,
        SOFTCAP=mixer.softcap is not None,
        CT=tile.tokens,
        S=tile.splits,
        LINES=_PREFETCH_LINES,
        PDL=pdl,
        num_warps=tile.warps,
        launch_pdl=pdl,
    )
    planes = out if isinstance(out, Planes) else None
    combine_kernel[(count * mixer.heads,)](
        parts,
        sums,
        sequences.slots,
        sequences.positions,
        out.pairs if isinstance(out, Planes) else out,
        unused if planes is None else planes.scales,
        H=mixer.heads,
        D=mixer.head_dim,
        DP=dims,
        S=tile.splits,
        WINDOW=mixer.window or 0,
        CT=tile.tokens,
        FORM="planes" if planes is not None else "shuffled" if shuffled else "values",
        WIDTH=out.columns if isinstance(out, Planes) else out.shape[1],
        PDL=pdl,
        num_warps=max(1, min(4, tile.splits * dims // 1024)),
        launch_pdl=pdl,
    )


def reference(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    """One token: q fp32 [H, D], every visible key and value [KH, tokens, D] -> fp32 [H, D]."""
    kv_heads = keys.shape[0]
    scores = torch.einsum("kgd,ktd->kgt", q.unflatten(0, (kv_heads, -1)), keys.float()) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.einsum("kgt,ktd->kgd", scores.softmax(-1), values.float()).flatten(0, 1)
