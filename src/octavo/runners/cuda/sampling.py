"""The sampling law (docs/sampling.md) for any rows of a batch in one go: buffers and launches, what a graph captures.

Which slots the rows are and where their logits lie is data, as are the slots' parameters (`laws`): one graph a
batch size serves any mixture. Kernels: shape_logits, draw, settle; and for rows that want logprobs two more.
Shape letters: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton

from octavo.runners.cuda import shape_logits as shaping
from octavo.runners.cuda.draw import draw, draw_tile_for
from octavo.runners.cuda.laws import SlotLaws
from octavo.runners.cuda.logprobs import LogprobBuffers, logprobs
from octavo.runners.cuda.settle import settle
from octavo.runners.cuda.shape_logits import shape_logits


@dataclass(frozen=True, slots=True)
class Row:
    """A row to sample from."""

    slot: int
    given: int
    """Address of fp32 [V]."""
    own: int
    """Address of the model's logits."""
    mask: int
    """Which of the masks; -1: none."""
    top_logprobs: int
    """How many alternatives to report; -1: no logprobs."""


class SampleStep:
    """The law for up to B rows. `sampled` int32 [B], `told` (`octavo.runners.cuda.pick.move_on`) and `found`
    (`read_logprobs`) are its results."""

    def __init__(
        self,
        laws: SlotLaws,
        last_tokens: torch.Tensor,
        positions: torch.Tensor,
        told: torch.Tensor,
        count: int,
        *,
        multiprocessors: int,
    ) -> None:
        self._laws = laws
        self._last_tokens = last_tokens
        self._positions = positions
        self._told = told
        self._spare_slot, vocabulary = laws.counts.shape[0] - 1, laws.counts.shape[1]
        device = last_tokens.device

        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        pieces = triton.cdiv(vocabulary, shaping.PIECE_TOKENS)
        self._tile = tile = draw_tile_for(count, vocabulary, multiprocessors)
        self._filler = (self._spare_slot, 0, 0, -1)
        self._table: tuple[tuple[int, ...], ...] = ()
        self._rows = torch.tensor([self._filler] * count, dtype=torch.int64, device=device)
        self._tops: tuple[int, ...] = ()
        self._wanted = ints(count) - 1
        self._masks = ints(count, -(-vocabulary // 32))
        self._scores = torch.zeros((count, vocabulary), device=device)
        self._stats = torch.zeros((count, pieces, 3), device=device)
        self._best_ids = ints(count, pieces)
        self._drawn = torch.zeros((count, tile.ctas), device=device)
        self._drawn_ids = ints(count, tile.ctas)
        self._counts = ints(2, count, tile.ctas, tile.pivots)
        self._weights = torch.zeros((2, count, tile.ctas, tile.pivots), device=device)
        self._arrived = ints(count)
        self._logprobs = LogprobBuffers.empty(count, vocabulary, device)
        self.sampled = ints(count)

    @property
    def found(self) -> torch.Tensor:
        return self._logprobs.found

    @property
    def nbytes(self) -> int:
        """Of the buffers."""
        tensors = [value for value in vars(self).values() if isinstance(value, torch.Tensor)]
        shared = self._last_tokens.nbytes + self._positions.nbytes + self._told.nbytes
        return sum(tensor.nbytes for tensor in tensors) - shared + self._logprobs.nbytes

    def set_rows(self, rows: Sequence[Row], masks: Sequence[np.ndarray]) -> None:
        """Which rows, and their masks (uint32 [ceil(V / 32)] each): copied where they are not what they were."""
        fill = len(self.sampled) - len(rows)
        table = (*((row.slot, row.given, row.own, row.mask) for row in rows), *[self._filler] * fill)
        if table != self._table:
            self._copy(self._rows, torch.tensor(table, dtype=torch.int64))
            self._table = table
        tops = (*(row.top_logprobs for row in rows), *[-1] * fill)
        if tops != self._tops:
            self._copy(self._wanted, torch.tensor(tops, dtype=torch.int32))
            self._tops = tops
        if masks:
            words = np.stack(masks).astype("<u4", copy=False).view(np.int32)
            self._copy(self._masks[: len(masks)], torch.from_numpy(words))

    def launch(self) -> None:
        """Sample; moves the slots on."""
        laws, spare = self._laws, self._spare_slot
        shape_logits(
            self._rows,
            laws,
            self._masks,
            self._scores,
            self._stats,
            self._best_ids,
            self._arrived,
            spare_slot=spare,
        )
        draw(
            self._rows,
            laws,
            self._positions,
            self._scores,
            self._stats,
            self._drawn,
            self._drawn_ids,
            self._counts,
            self._weights,
            self._arrived,
            self._tile,
            spare_slot=spare,
        )
        settle(
            self._rows,
            laws,
            self._stats,
            self._best_ids,
            self._drawn,
            self._drawn_ids,
            self.sampled,
            self._last_tokens,
            self._positions,
            self._told,
            spare_slot=spare,
        )

    def launch_logprobs(self) -> None:
        """Of the tokens just sampled."""
        own = self._rows[:, shaping.OWN.value]
        logprobs(own, self.sampled, self._wanted, self._laws.counts.shape[1], self._logprobs)

    def _copy(self, to: torch.Tensor, values: torch.Tensor) -> None:
        # torch keeps a pinned block until the stream is past the copy that reads it.
        to.copy_(values.pin_memory() if to.is_cuda else values, non_blocking=True)
