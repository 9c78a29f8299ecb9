"""Where top-k and top-p end: the last token in order that stays, found by narrowing a bracket, without a sort.

The order of the law (largest score first, ties by lowest id) is that of one integer a token, its *place*. Each round
counts, and weighs, the tokens at or above some pivots, half of them spread over the places of the bracket and half
over its scores; it ends when one token is left between a place that is enough and one that is not. Which tokens that
is does not depend on the pivots. The CTAs of a row share its tokens and meet each round to add up.
Shape letters: V vocabulary, P CTAs of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ID_BITS = tl.constexpr(24)
LAST_ID = tl.constexpr((1 << 24) - 1)
"""Places have room for so many tokens."""

LEAST = tl.constexpr(-3.4028234663852886e38)
_FINE = tl.constexpr(1 << 30)
_COARSE_SHIFT = tl.constexpr(26)
"""Brackets wider than _FINE are cut in steps of 2^26 places, so that steps have 32 bits: all places take 56."""

_WINDOW = tl.constexpr(24.0)
"""Scores that value pivots look at below the best, in temperatures: e^-24 of its probability."""


@triton.jit
def place_of(score, token):
    """int64, larger where a token comes earlier; 0.0 and -0.0 are equal."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (key.to(tl.int64) << _ID_BITS) + LAST_ID - token


@triton.jit
def score_at(place):
    key = (place >> _ID_BITS).to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pivots_between(low, high, shift, temperature, PIVOTS: tl.constexpr):
    """int32 [PIVOTS], steps of 2^shift above `low`: 0 first, another one unless low + 1 = high, none at `high`."""
    index = tl.arange(0, PIVOTS)
    half: tl.constexpr = PIVOTS // 2
    steps = ((high - low - 1) >> shift) + 1
    spread = tl.maximum(steps // half, 1) * index
    top = score_at(high - 1)
    bottom = tl.maximum(score_at(low), top - _WINDOW * temperature)
    score = bottom + (top - bottom) * ((index - half + 1).to(tl.float32) / (half + 1))
    step = (tl.maximum(place_of(score, LAST_ID) - low, 0) + (1 << shift) - 1) >> shift
    return tl.minimum(tl.where(index < half, spread, step), steps - 1).to(tl.int32)


@triton.jit
def measure(
    scores, first, last, low, high, shift, pivots, most, temperature, PIVOTS: tl.constexpr, BLOCK: tl.constexpr,
    LOOK: tl.constexpr,
):  # fmt: skip
    """How many of the tokens [first, last) lie in [pivot, high), and their weights: [PIVOTS] int32 and fp32.

    After a round or two most of a row lies outside: LOOK tokens at once are only looked at.
    """
    count = tl.zeros((PIVOTS, BLOCK), tl.int32)
    weight = tl.zeros((PIVOTS, BLOCK), tl.float32)
    least, largest = score_at(low), score_at(high - 1)
    for ahead in range(first, last, LOOK):
        ahead_token = ahead + tl.arange(0, LOOK)
        ahead_score = tl.load(scores + ahead_token, mask=ahead_token < last, other=float("-inf"))
        if tl.max(((ahead_score >= least) & (ahead_score <= largest)).to(tl.int32), 0) > 0:
            for start in range(ahead, tl.minimum(ahead + LOOK, last), BLOCK):
                token = start + tl.arange(0, BLOCK)
                score = tl.load(scores + token, mask=token < last, other=float("-inf"))
                place = place_of(score, token)
                step = tl.where((place >= low) & (place < high), (place - low) >> shift, -1).to(tl.int32)
                reached = step[None, :] >= pivots[:, None]
                count += reached.to(tl.int32)
                each = tl.exp(tl.math.div_rn(score - most, temperature))
                weight += tl.where(reached, each[None, :], 0.0)
    return tl.sum(count, 1), tl.sum(weight, 1)


@triton.jit
def meet(arrived, times):
    """Wait until all CTAs of a row have come here; what they stored before is visible then.

    They all run at once: the grid is no larger than the card. `times`: arrivals so far, all rounds together.
    """
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="acq_rel")
    while tl.atomic_add(arrived, 0, sem="acquire") < times:
        pass
    tl.debug_barrier()


@triton.jit
def add_up(count, weight, counts, weights, share, arrived, rounds, P: tl.constexpr, P_P2: tl.constexpr,
           PIVOTS: tl.constexpr, EXCHANGE: tl.constexpr):  # fmt: skip
    """Sums over the CTAs of a row, the same bits in each. Buffers alternate, since one may be a round ahead."""
    if P == 1:
        return count, weight
    else:
        index = tl.arange(0, PIVOTS)
        buffer = (rounds % 2) * EXCHANGE
        tl.store(counts + buffer + share * PIVOTS + index, count)
        tl.store(weights + buffer + share * PIVOTS + index, weight)
        meet(arrived, (rounds + 1) * P)
        cta = tl.arange(0, P_P2)[:, None]
        place = buffer + cta * PIVOTS + index[None, :]
        every_count = tl.load(counts + place, mask=cta < P, other=0, cache_modifier=".cg")
        every_weight = tl.load(weights + place, mask=cta < P, other=0.0, cache_modifier=".cg")
        return tl.sum(every_count, 0), tl.sum(every_weight, 0)


@triton.jit
def find_cut(
    scores, first, last, low, most, temperature, goal, wanted, counts, weights, share, arrived, rounds,
    BY_WEIGHT: tl.constexpr, P: tl.constexpr, P_P2: tl.constexpr, PIVOTS: tl.constexpr, EXCHANGE: tl.constexpr,
    BLOCK: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    """The place of the last token that stays of those at or above `low` -> (place, rounds).

    `goal`: how many stay, or BY_WEIGHT the share of all their weights that the shortest beginning has to reach;
    `low` where there are not that many, or it is not `wanted`.
    """
    high = place_of(most, 0) + 1
    above_count = rounds * 0
    above_weight = temperature * 0
    enough_weight = temperature * 0
    inside = tl.where(wanted, 2, 0)
    first_round = rounds
    while inside > 1:
        shift = tl.where(high - low < _FINE, 0, _COARSE_SHIFT).to(tl.int64)
        steps = pivots_between(low, high, shift, temperature, PIVOTS)
        own_count, own_weight = measure(
            scores, first, last, low, high, shift, steps, most, temperature, PIVOTS, BLOCK, LOOK
        )
        pivots = low + (steps.to(tl.int64) << shift)
        count, weight = add_up(
            own_count, own_weight, counts, weights, share, arrived, rounds, P, P_P2, PIVOTS, EXCHANGE
        )
        count += above_count
        weight += above_weight
        if BY_WEIGHT:
            if rounds == first_round:
                enough_weight = goal * tl.sum(tl.where(tl.arange(0, PIVOTS) == 0, weight, 0.0), 0)
            enough = weight >= enough_weight
        else:
            enough = count >= goal
        reached = tl.max(enough.to(tl.int32), 0) > 0
        low = tl.max(tl.where(enough, pivots, low), 0)
        high = tl.min(tl.where(enough | (pivots <= low), high, pivots), 0)
        above_count = tl.max(tl.where(pivots == high, count, above_count), 0)
        above_weight = tl.max(tl.where(pivots == high, weight, above_weight), 0)
        at_low = tl.max(tl.where(pivots == low, count, 0), 0)
        inside = tl.where(reached, at_low - above_count, 0)
        rounds += 1
    return low, rounds


def reference(scores: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """bool [V] of fp32 [V]: what stays, by sorting."""
    order = scores.sort(descending=True, stable=True).indices
    order = order[: int((scores > -torch.inf).sum())][: top_k or None]
    if top_p < 1:
        weights = ((scores[order] - scores.max()) / torch.full_like(scores[:1], temperature)).double().exp()
        cumulative = weights.cumsum(0)
        reached = int(torch.searchsorted(cumulative, top_p * cumulative[-1]))
        order = order[: reached + 1]
    return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, order, True)
