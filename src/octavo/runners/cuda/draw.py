"""The draw: steps 5 to 9 of the sampling law on shaped rows, for those that are not greedy.

Contract: scores fp32 [B, V] and stats of `shape_logits` -> drawn fp32 and drawn_ids int32 [B, P]: the best of
y + noise that each CTA of a row found among what top-k, top-p and min-p leave.
Shape letters: B sequences, V vocabulary, P CTAs of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.runners.cuda.cut import LAST_ID, LEAST, find_cut, place_of
from octavo.runners.cuda.laws import (
    CHOICE,
    GREEDY,
    LOG_MIN_P,
    SEED_HIGH,
    SEED_LOW,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    TRAITS,
    WORDS,
    SlotLaws,
)
from octavo.runners.cuda.noise import gumbel, random_words
from octavo.runners.cuda.shape_logits import COLUMNS, SLOT, load_float


@triton.jit(do_not_specialize=["spare_slot"])
def draw_kernel(
    rows, laws, positions, scores, stats, drawn, drawn_ids, counts, weights, arrived, spare_slot,
    V: tl.constexpr, PIECES: tl.constexpr, PIECES_P2: tl.constexpr, P: tl.constexpr, P_P2: tl.constexpr,
    PIVOTS: tl.constexpr, EXCHANGE: tl.constexpr, BLOCK: tl.constexpr, LOOK: tl.constexpr,
    DRAW_BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: B P, all at once on the card. EXCHANGE: elements of one of the two buffers `counts` and `weights`."""
    row = tl.program_id(0) // P
    share = tl.program_id(0) % P
    slot = tl.load(rows + row * COLUMNS + SLOT)
    words = laws + slot * WORDS
    if (slot != spare_slot) & ((tl.load(words + TRAITS) & GREEDY) == 0):
        piece = tl.arange(0, PIECES_P2)
        most = tl.max(
            tl.load(stats + (row * PIECES + piece) * 3, mask=piece < PIECES, other=float("-inf")), 0
        )
        finite = (most < float("inf")) & (most > float("-inf"))
        temperature = load_float(words, TEMPERATURE)
        top_k = tl.load(words + TOP_K)
        top_p = load_float(words, TOP_P)
        log_min_p = load_float(words, LOG_MIN_P)
        each: tl.constexpr = ((V + BLOCK - 1) // BLOCK + P - 1) // P * BLOCK
        first = share * each
        last = tl.where(finite, tl.minimum(first + each, V), first)
        line = scores + row.to(tl.int64) * V
        exchange = row * (P * PIVOTS)
        low = place_of(temperature * 0 + LEAST, LAST_ID)
        rounds = slot.to(tl.int32) * 0
        low, rounds = find_cut(
            line, first, last, low, most, temperature, top_k, finite & (top_k > 0) & (top_k < V),
            counts + exchange, weights + exchange, share, arrived + row, rounds,
            False, P, P_P2, PIVOTS, EXCHANGE, BLOCK, LOOK,
        )  # fmt: skip
        low, rounds = find_cut(
            line, first, last, low, most, temperature, top_p, finite & (top_p < 1.0),
            counts + exchange, weights + exchange, share, arrived + row, rounds,
            True, P, P_P2, PIVOTS, EXCHANGE, BLOCK, LOOK,
        )  # fmt: skip

        position = tl.load(positions + slot) + 1
        seed_low = tl.load(words + SEED_LOW)
        seed_high = tl.load(words + SEED_HIGH)
        choice = tl.load(words + CHOICE)
        best = tl.full((DRAW_BLOCK,), float("-inf"), tl.float32)
        best_id = tl.full((DRAW_BLOCK,), 2147483647, tl.int32)
        for start in range(first, last, DRAW_BLOCK):
            token = start + tl.arange(0, DRAW_BLOCK)
            score = tl.load(line + token, mask=token < last, other=float("-inf"))
            scaled = tl.math.div_rn(score - most, temperature)
            stays = (place_of(score, token) >= low) & (scaled >= log_min_p)
            if tl.max(stays.to(tl.int32), 0) > 0:
                noise = gumbel(random_words(start, position, seed_low, seed_high, choice, DRAW_BLOCK))
                value = tl.where(stays, scaled + noise, float("-inf"))
                best_id = tl.where(value > best, token, best_id)
                best = tl.maximum(best, value)
        largest = tl.max(best, 0)
        tl.store(drawn + row * P + share, largest)
        tl.store(drawn_ids + row * P + share, tl.min(tl.where(best == largest, best_id, 2147483647), 0))


@dataclass(frozen=True, slots=True)
class DrawTile:
    """How a row is cut, and searched."""

    ctas: int
    """P."""
    pivots: int
    block: int
    look: int
    """Tokens that are looked at together to see whether any is in the bracket: a multiple of `block`."""
    warps: int


def draw_tile_for(batch: int, vocabulary: int, multiprocessors: int) -> DrawTile:
    """At most as many CTAs as multiprocessors, so that all run at once; none without tokens.

    A larger block spills registers: pivots times tokens are held twice.
    """
    ctas = max(1, min(multiprocessors // batch, triton.cdiv(vocabulary, 1024)))
    return DrawTile(ctas, pivots=16, block=512, look=1024 if ctas > 8 else 4096, warps=8)


def draw(
    rows: torch.Tensor,
    laws: SlotLaws,
    positions: torch.Tensor,
    scores: torch.Tensor,
    stats: torch.Tensor,
    drawn: torch.Tensor,
    drawn_ids: torch.Tensor,
    counts: torch.Tensor,
    weights: torch.Tensor,
    arrived: torch.Tensor,
    tile: DrawTile,
    *,
    spare_slot: int,
) -> None:
    """Launch it. counts int32, weights fp32 [2, B, P, pivots] and `arrived` int32 [B], cleared, are workspace."""
    count, vocabulary = scores.shape
    pieces = stats.shape[1]
    draw_kernel[(count * tile.ctas,)](
        rows,
        laws.words,
        positions,
        scores,
        stats,
        drawn,
        drawn_ids,
        counts,
        weights,
        arrived,
        spare_slot,
        V=vocabulary,
        PIECES=pieces,
        PIECES_P2=triton.next_power_of_2(pieces),
        P=tile.ctas,
        P_P2=triton.next_power_of_2(tile.ctas),
        PIVOTS=tile.pivots,
        EXCHANGE=counts[0].numel(),
        BLOCK=tile.block,
        LOOK=tile.look,
        DRAW_BLOCK=4 * 32 * tile.warps,  # a thread makes the noise of four tokens
        num_warps=tile.warps,
        enable_fp_fusion=False,  # the law rounds after each operation
    )
