"""A prompt's tokens as rows of the decode step: what `--deterministic` computes prompts with.

One arithmetic for all is one sequence of kernels of one size: a step of a fixed number of rows, whether they are
tokens of one prompt or sequences that decode, few or many; the rest of them are filled up. No kernel's result for a row
depends on another row, but for the keys and values that it attends to, which are written first.
Shape letters: T tokens, R rows.
"""

from __future__ import annotations

import torch

from octavo.runners.cuda.batch_decode import BatchStep
from octavo.runners.cuda.decode import Card
from octavo.runners.cuda.decode_attention import Sequences
from octavo.runners.cuda.device_model import DeviceModel
from octavo.runners.cuda.kv_cache import LayerCache


class PromptRows:
    """R consecutive tokens of a sequence at once, at most. `step.logits` has a row for each."""

    def __init__(
        self,
        model: DeviceModel,
        caches: tuple[LayerCache, ...],
        spare_pages: tuple[int, ...],
        rows: int,
        *,
        pages: int,
        context_tokens: int,
        compute_dtype: torch.dtype,
        card: Card,
    ) -> None:
        """`spare_pages`: for each KV group the page that rows without a token write to; `pages` of a context."""
        device = model.embedding.codes.device
        self.rows = rows
        self._spare_pages = spare_pages
        self._positions = torch.zeros(rows, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(rows, dtype=torch.int32, device=device)
        self._tables = tuple(
            torch.full((rows, pages), spare, dtype=torch.int32, device=device) for spare in spare_pages
        )
        every = torch.arange(rows, dtype=torch.int32, device=device)
        self.step = BatchStep(
            model,
            caches,
            Sequences(every, self._positions, self._tables, 0),
            self._tokens,
            context_tokens=context_tokens,
            compute_dtype=compute_dtype,
            card=card,
            appends_first=True,
        )

    @property
    def nbytes(self) -> int:
        tables = sum(table.nbytes for table in self._tables)
        return self.step.nbytes + self._positions.nbytes + tables

    def set(self, token_ids: torch.Tensor, start: int, tables: tuple[torch.Tensor, ...]) -> None:
        """int32 [T] at positions start.., T <= R; `tables`: for each KV group int32 [pages]."""
        tokens = token_ids.shape[0]
        self._tokens[:tokens] = token_ids
        end = start + tokens
        self._positions[:tokens] = torch.arange(start, end, dtype=torch.int32, device=token_ids.device)
        self._positions[tokens:] = 0
        for own, table, spare in zip(self._tables, tables, self._spare_pages, strict=True):
            own[:tokens] = table
            own[tokens:] = spare
