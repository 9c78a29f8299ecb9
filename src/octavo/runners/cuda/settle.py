"""The end of the law: each row's token, counted where penalties read counts, and its slot moved on to it.

Greedy rows take the best of `shape_logits`' pieces, the others what `draw` found. A row that is not finite gives -1,
counts nothing and leaves its slot at token 0. Contract: stats fp32 [B, pieces, 3], best_ids [B, pieces],
drawn and drawn_ids [B, P] -> sampled int32 [B], last_tokens, positions and counts of the slots.
Shape letters: B sequences, V vocabulary, P CTAs of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.runners.cuda.laws import GREEDY, PENALIZED, TRAITS, WORDS, SlotLaws
from octavo.runners.cuda.pick import TOLD_STEPS, move_on
from octavo.runners.cuda.shape_logits import COLUMNS, SLOT


@triton.jit
def is_finite(most):
    return (most < float("inf")) & (most > float("-inf"))


@triton.jit(do_not_specialize=["spare_slot"])
def settle_kernel(
    rows, laws, stats, best_ids, drawn, drawn_ids, counts, sampled, last_tokens, positions, told, spare_slot,
    V: tl.constexpr, PIECES: tl.constexpr, PIECES_P2: tl.constexpr, P: tl.constexpr, P_P2: tl.constexpr,
    TOLD: tl.constexpr,
):  # fmt: skip
    """Grid: B."""
    row = tl.program_id(0)
    slot = tl.load(rows + row * COLUMNS + SLOT)
    if slot != spare_slot:
        traits = tl.load(laws + slot * WORDS + TRAITS)
        piece = tl.arange(0, PIECES_P2)
        place = (row * PIECES + piece) * 3
        valid = piece < PIECES
        score = tl.load(stats + place, mask=valid, other=float("-inf"))
        most = tl.max(score, 0)
        most_given = tl.max(tl.load(stats + place + 1, mask=valid, other=float("-inf")), 0)
        most_own = tl.max(tl.load(stats + place + 2, mask=valid, other=float("-inf")), 0)
        token = tl.load(best_ids + row * PIECES + piece, mask=valid, other=2147483647)
        chosen = tl.min(tl.where(score == most, token, 2147483647), 0)
        if (traits & GREEDY) == 0:
            share = tl.arange(0, P_P2)
            value = tl.load(drawn + row * P + share, mask=share < P, other=float("-inf"))
            drawn_token = tl.load(drawn_ids + row * P + share, mask=share < P, other=2147483647)
            chosen = tl.min(tl.where(value == tl.max(value, 0), drawn_token, 2147483647), 0)
        finite = is_finite(most) & is_finite(most_given) & is_finite(most_own)
        if finite & ((traits & PENALIZED) != 0):
            count = counts + slot * V + chosen
            tl.store(count, tl.load(count) + 1)
        move_on(sampled + row, last_tokens, positions, told, slot, chosen, finite, True, TOLD)


def settle(
    rows: torch.Tensor,
    laws: SlotLaws,
    stats: torch.Tensor,
    best_ids: torch.Tensor,
    drawn: torch.Tensor,
    drawn_ids: torch.Tensor,
    sampled: torch.Tensor,
    last_tokens: torch.Tensor,
    positions: torch.Tensor,
    told: torch.Tensor,
    *,
    spare_slot: int,
) -> None:
    """Launch it."""
    pieces, ctas = stats.shape[1], drawn.shape[1]
    settle_kernel[(len(sampled),)](
        rows,
        laws.words,
        stats,
        best_ids,
        drawn,
        drawn_ids,
        laws.counts,
        sampled,
        last_tokens,
        positions,
        told,
        spare_slot,
        V=laws.counts.shape[1],
        PIECES=pieces,
        PIECES_P2=triton.next_power_of_2(pieces),
        P=ctas,
        P_P2=triton.next_power_of_2(ctas),
        TOLD=TOLD_STEPS,
        num_warps=4,
    )
