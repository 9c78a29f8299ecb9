"""The greedy end of a step: the best token of each row, and its slot moved on to it.

`best_of_rows` finds the best of each piece of a row (gemv's head does it in passing); `pick` takes the best of
all pieces, ties to the lowest id. A row that is not finite gives -1 and leaves its slot at token 0.
Contract: best fp32 and best_ids int32 [B, pieces] -> sampled int32 [B], last_tokens and positions [slots], and
`told` in the host's memory, so that no copy stands between two steps.
Shape letters: B sequences, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.runners.cuda.decode_attention import Sequences
from octavo.runners.cuda.ptx import wait_for_inputs


@triton.jit(do_not_specialize=["V"])
def best_of_rows_kernel(logits, best, best_ids, V, BLOCK: tl.constexpr):
    """Grid: (B, pieces of BLOCK)."""
    row = tl.program_id(0)
    piece = tl.program_id(1)
    token = piece * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + row.to(tl.int64) * V + token, mask=token < V, other=float("-inf"))
    value = tl.where(value == value, value, float("inf"))
    most = tl.max(value, 0)
    place = row * tl.num_programs(1) + piece
    tl.store(best + place, most)
    tl.store(best_ids + place, tl.min(tl.where(value == most, token, 2147483647), 0))


TOLD_STEPS = 4
"""Tokens of a slot that the host may have yet to read: two steps are under way at once."""


@triton.jit
def move_on(sampled, last_tokens, positions, told, slot, chosen, finite, own, TOLD: tl.constexpr):
    """A row's token, and its slot where it has one of its `own`: -1 and token 0 where the row is not finite.

    `told` [slots, TOLD] is memory of the host: the token at position p stands at p mod TOLD.
    """
    token = tl.where(finite, chosen, -1)
    position = tl.load(positions + slot) + 1
    tl.store(sampled, token)
    tl.store(last_tokens + slot, tl.maximum(token, 0), mask=own)
    tl.store(positions + slot, position, mask=own)
    if TOLD > 0:
        tl.store(told + slot * TOLD + position % TOLD, token, mask=own)


@triton.jit(do_not_specialize=["pieces", "spare_slot"])
def pick_kernel(
    best, best_ids, slots, sampled, last_tokens, positions, told, pieces, spare_slot,
    PIECES_P2: tl.constexpr, TOLD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: B. Releases nobody early, so that the next step may read positions and old keys at once."""
    row = tl.program_id(0)
    piece = tl.arange(0, PIECES_P2)
    wait_for_inputs(PDL)
    slot = tl.load(slots + row)
    value = tl.load(best + row * pieces + piece, mask=piece < pieces, other=float("-inf"))
    token = tl.load(best_ids + row * pieces + piece, mask=piece < pieces, other=2147483647)
    most = tl.max(value, 0)
    chosen = tl.min(tl.where(value == most, token, 2147483647), 0)
    finite = (most < float("inf")) & (most > float("-inf"))
    own = slot != spare_slot
    move_on(sampled + row, last_tokens, positions, told, slot, chosen, finite, own, TOLD)


PIECE_TOKENS = 4096
"""Logits that one CTA of `best_of_rows` looks at."""


def best_of_rows(logits: torch.Tensor, best: torch.Tensor, best_ids: torch.Tensor) -> int:
    """Launch it for logits fp32 [B, V]; returns the pieces of a row."""
    rows, vocabulary = logits.shape
    pieces = -(-vocabulary // PIECE_TOKENS)
    best_of_rows_kernel[(rows, pieces)](logits, best, best_ids, vocabulary, BLOCK=PIECE_TOKENS, num_warps=8)
    return pieces


def pick(
    best: torch.Tensor,
    best_ids: torch.Tensor,
    pieces: int,
    sequences: Sequences,
    sampled: torch.Tensor,
    last_tokens: torch.Tensor,
    told: torch.Tensor | None = None,
    *,
    pdl: bool,
) -> None:
    """Launch it: sampled int32 [B] from the `pieces` best of each row. `told`: see `move_on`."""
    rows = sampled.shape[0]
    pick_kernel[(rows,)](
        best,
        best_ids,
        sequences.slots,
        sampled,
        last_tokens,
        sequences.positions,
        sampled if told is None else told,
        pieces,
        sequences.spare_slot,
        PIECES_P2=triton.next_power_of_2(pieces),
        TOLD=0 if told is None else TOLD_STEPS,
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )
