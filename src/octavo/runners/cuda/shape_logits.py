"""Penalties, bias and mask on rows of logits: steps 0 to 3 of the sampling law, and the best token of each piece.

A row's logits lie anywhere: `rows` holds their addresses, so decode rows, a prefill's last row and what a logits
processor made go through together. Contract: rows int64 [B, 4] (columns below) -> scores fp32 [B, V], -inf where
a token cannot be sampled; stats fp32 [B, pieces, 3]: the largest score, given logit and logit of the model, +inf
where one is NaN; best_ids int32 [B, pieces]. Rows of the spare slot are left alone.
Shape letters: B sequences, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.runners.cuda.laws import (
    BIASED,
    FREQUENCY,
    IN_PROMPT,
    PENALIZED,
    PRESENCE,
    REPETITION,
    TRAITS,
    WORDS,
    SlotLaws,
)

SLOT = tl.constexpr(0)
GIVEN = tl.constexpr(1)
"""Address of the logits to sample from."""
OWN = tl.constexpr(2)
"""Address of the model's logits: the same, unless processors changed them."""
MASK = tl.constexpr(3)
"""Row of `masks`; -1: every token is allowed."""
COLUMNS = tl.constexpr(4)

PIECE_TOKENS = 2048
"""Logits that one CTA looks at."""


@triton.jit
def load_float(words, index):
    return tl.load(words + index).to(tl.float32, bitcast=True)


@triton.jit
def largest(value):
    """The largest of a tile, +inf where one is NaN."""
    return tl.max(tl.where(value == value, value, float("inf")), 0)


@triton.jit
def penalize(value, count, words):
    repetition = load_float(words, REPETITION)
    frequency = load_float(words, FREQUENCY)
    presence = load_float(words, PRESENCE)
    penalized = tl.where(value > 0, tl.math.div_rn(value, repetition), value * repetition)
    value = tl.where(count != 0, penalized, value)
    generated = count & (IN_PROMPT - 1)
    lowered = (value - frequency * generated.to(tl.float32)) - presence
    return tl.where(generated > 0, lowered, value)


@triton.jit(do_not_specialize=["spare_slot"])
def shape_kernel(
    rows, laws, counts, biases, masks, scores, stats, best_ids, arrived, spare_slot,
    V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (B, pieces of BLOCK). Also clears `arrived` [B] for `draw`."""
    row = tl.program_id(0)
    piece = tl.program_id(1)
    slot = tl.load(rows + row * COLUMNS + SLOT)
    if piece == 0:
        tl.store(arrived + row, 0)
    if slot != spare_slot:
        given = tl.load(rows + row * COLUMNS + GIVEN)
        own = tl.load(rows + row * COLUMNS + OWN)
        mask_row = tl.load(rows + row * COLUMNS + MASK)
        words = laws + slot * WORDS
        traits = tl.load(words + TRAITS)
        token = piece * BLOCK + tl.arange(0, BLOCK)
        inside = token < V
        value = tl.load(given.to(tl.pointer_type(tl.float32)) + token, mask=inside, other=float("-inf"))
        most_given = largest(value)
        most_own = most_given
        if own != given:
            most_own = largest(
                tl.load(own.to(tl.pointer_type(tl.float32)) + token, mask=inside, other=float("-inf"))
            )
        if (traits & PENALIZED) != 0:
            value = penalize(value, tl.load(counts + slot * V + token, mask=inside, other=0), words)
        if (traits & BIASED) != 0:
            value += tl.load(biases + slot * V + token, mask=inside, other=0.0)
        if mask_row >= 0:
            bits = tl.load(masks + mask_row * ((V + 31) // 32) + token // 32, mask=inside, other=0)
            value = tl.where(((bits >> (token % 32)) & 1) != 0, value, float("-inf"))
        tl.store(scores + row.to(tl.int64) * V + token, value, mask=inside)
        most = largest(value)
        place = row * tl.num_programs(1) + piece
        tl.store(stats + place * 3, most)
        tl.store(stats + place * 3 + 1, most_given)
        tl.store(stats + place * 3 + 2, most_own)
        tl.store(best_ids + place, tl.min(tl.where(value == most, token, 2147483647), 0))


def shape_logits(
    rows: torch.Tensor,
    laws: SlotLaws,
    masks: torch.Tensor,
    scores: torch.Tensor,
    stats: torch.Tensor,
    best_ids: torch.Tensor,
    arrived: torch.Tensor,
    *,
    spare_slot: int,
) -> None:
    """Launch it. `masks` int32 [any, ceil(V / 32)]: bit i % 32 of word i // 32 set where token i is allowed."""
    count, vocabulary = scores.shape
    shape_kernel[(count, stats.shape[1])](
        rows,
        laws.words,
        laws.counts,
        laws.biases,
        masks,
        scores,
        stats,
        best_ids,
        arrived,
        spare_slot,
        V=vocabulary,
        BLOCK=PIECE_TOKENS,
        num_warps=4,
        enable_fp_fusion=False,  # the law rounds after each operation
    )


def reference(
    logits: torch.Tensor,
    counts: torch.Tensor,
    penalties: tuple[float, float, float],
    biases: torch.Tensor,
    allowed: torch.Tensor,
) -> torch.Tensor:
    """fp32 [V]; counts as `SlotLaws` has them; penalties: repetition, frequency, presence; allowed bool [V]."""
    repetition, frequency, presence = (torch.tensor(value, device=logits.device) for value in penalties)
    penalized = torch.where(logits > 0, logits / repetition, logits * repetition)
    scores = torch.where(counts != 0, penalized, logits)
    generated = counts & (IN_PROMPT.value - 1)
    scores = torch.where(generated > 0, (scores - frequency * generated.float()) - presence, scores)
    return torch.where(allowed, scores + biases, -torch.inf)
