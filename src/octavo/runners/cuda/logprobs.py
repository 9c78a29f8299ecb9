"""Logprobs of rows of unmodified logits: the chosen token's, and the most probable ones, best first.

`look_kernel` takes the largest of each piece of a row one after the other, `rank_kernel` those of all pieces; ties
go to the lowest id, so the order is the law's. Rows lie anywhere, by address.
Contract: addresses int64 [R, stride], tokens int32 [R], wanted int32 [R] (-1: nothing of this row) -> `found`: one
piece, so that one copy reads it, of fp32 chosen [R], top [R, MOST_TOP] and the bits of their ids [R, MOST_TOP], of
which `wanted` are written.
Shape letters: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.types import TokenLogprob

MOST_TOP = 20
"""Alternatives at each token: what `octavo.backends.native` says it takes."""

PIECE_TOKENS = 2048

_NONE = tl.constexpr(2147483647)


@triton.jit
def take_best(value, token):
    """(largest value, its lowest id, values and ids without it)."""
    most = tl.max(value, 0)
    best = tl.min(tl.where(value == most, token, _NONE), 0)
    taken = token == best
    return most, best, tl.where(taken, float("-inf"), value), tl.where(taken, _NONE, token)


@triton.jit(do_not_specialize=["stride"])
def look_kernel(
    addresses, wanted, sums, piece_top, piece_ids, stride, V: tl.constexpr, TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (R, pieces of BLOCK). sums fp32 [R, pieces, 2]: the largest logit, and the sum of exp(l - largest)."""
    row = tl.program_id(0)
    piece = tl.program_id(1)
    top = tl.load(wanted + row)
    if top >= 0:
        logits = tl.load(addresses + row.to(tl.int64) * stride).to(tl.pointer_type(tl.float32))
        token = piece * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(logits + token, mask=token < V, other=float("-inf"))
        token = tl.where(token < V, token, _NONE)
        most = tl.max(value, 0)
        base = tl.where(most > float("-inf"), most, 0.0)
        total = tl.sum(tl.exp(value - base), 0)
        place = row * tl.num_programs(1) + piece
        tl.store(sums + place * 2, most)
        tl.store(sums + place * 2 + 1, total)
        for rank in range(top):
            most, best, value, token = take_best(value, token)
            tl.store(piece_top + place * TOP + rank, most)
            tl.store(piece_ids + place * TOP + rank, best)


@triton.jit(do_not_specialize=["stride"])
def rank_kernel(
    addresses, tokens, wanted, sums, piece_top, piece_ids, found, stride,
    PIECES: tl.constexpr, PIECES_P2: tl.constexpr, TOP: tl.constexpr, TOP_P2: tl.constexpr,
):  # fmt: skip
    """Grid: R."""
    row = tl.program_id(0)
    top = tl.load(wanted + row)
    if top >= 0:
        piece = tl.arange(0, PIECES_P2)
        place = row * PIECES + piece
        largest = tl.load(sums + place * 2, mask=piece < PIECES, other=float("-inf"))
        total = tl.load(sums + place * 2 + 1, mask=piece < PIECES, other=0.0)
        most = tl.max(largest, 0)
        log_total = most + tl.log(tl.sum(total * tl.exp(largest - most), 0))
        logits = tl.load(addresses + row.to(tl.int64) * stride).to(tl.pointer_type(tl.float32))
        token = tl.maximum(tl.load(tokens + row), 0)
        tl.store(found + row, tl.load(logits + token) - log_total)
        index = tl.arange(0, PIECES_P2 * TOP_P2)
        rank = index % TOP_P2
        place = (row * PIECES + index // TOP_P2) * TOP + rank
        valid = (index // TOP_P2 < PIECES) & (rank < top)
        value = tl.load(piece_top + place, mask=valid, other=float("-inf"))
        ids = tl.load(piece_ids + place, mask=valid, other=_NONE)
        rows = tl.num_programs(0)
        tops = found + rows + row * TOP
        for number in range(top):
            best_value, best, value, ids = take_best(value, ids)
            tl.store(tops + number, best_value - log_total)
            tl.store(tops + rows * TOP + number, best.to(tl.float32, bitcast=True))


@dataclass(frozen=True, slots=True)
class LogprobBuffers:
    """Workspace of R rows, and their results."""

    sums: torch.Tensor
    piece_top: torch.Tensor
    piece_ids: torch.Tensor
    found: torch.Tensor
    """fp32 [R (1 + 2 MOST_TOP)]."""

    @classmethod
    def empty(cls, rows: int, vocabulary: int, device: torch.device) -> LogprobBuffers:
        pieces = triton.cdiv(vocabulary, PIECE_TOKENS)
        top = torch.zeros((rows, pieces, MOST_TOP), device=device)
        return cls(
            torch.zeros((rows, pieces, 2), device=device),
            top,
            torch.zeros_like(top, dtype=torch.int32),
            torch.zeros(rows * (1 + 2 * MOST_TOP), device=device),
        )

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.sums, self.piece_top, self.piece_ids, self.found))


def logprobs(
    addresses: torch.Tensor,
    tokens: torch.Tensor,
    wanted: torch.Tensor,
    vocabulary: int,
    buffers: LogprobBuffers,
) -> None:
    """Launch it. `addresses` int64 [R], which may be a column."""
    rows, pieces = buffers.sums.shape[:2]
    look_kernel[(rows, pieces)](
        addresses,
        wanted,
        buffers.sums,
        buffers.piece_top,
        buffers.piece_ids,
        addresses.stride(0),
        V=vocabulary,
        TOP=MOST_TOP,
        BLOCK=PIECE_TOKENS,
        num_warps=4,
    )
    rank_kernel[(rows,)](
        addresses,
        tokens,
        wanted,
        buffers.sums,
        buffers.piece_top,
        buffers.piece_ids,
        buffers.found,
        addresses.stride(0),
        PIECES=pieces,
        PIECES_P2=triton.next_power_of_2(pieces),
        TOP=MOST_TOP,
        TOP_P2=triton.next_power_of_2(MOST_TOP),
        num_warps=8,
    )


def read_logprobs(found: torch.Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
    """Of the first rows, from a copy of `LogprobBuffers.found` on the host."""
    rows = found.shape[0] // (1 + 2 * MOST_TOP)
    chosen = found[:rows].tolist()
    values = found[rows : rows * (1 + MOST_TOP)].view(rows, MOST_TOP).tolist()
    ids = found[rows * (1 + MOST_TOP) :].view(torch.int32).view(rows, MOST_TOP).tolist()
    return [
        TokenLogprob(token, chosen[row], tuple(zip(ids[row][:top], values[row][:top], strict=True)))
        for row, (token, top) in enumerate(zip(tokens, tops, strict=True))
    ]
