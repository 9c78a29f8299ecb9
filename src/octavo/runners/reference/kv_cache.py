"""Paged keys and values as plain tensors, and how a chunk finds its tokens in them.

Each layer holds k and v of [KH, pages * 32, D]; token t of a sequence stands at row
table[t // 32] * 32 + t % 32. Shape letters: KH kv heads, D head dim, T tokens, S keys seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from octavo.models.spec import KV_PAGE_TOKENS, ModelSpec

Rows = slice | torch.Tensor
"""Rows of a layer's k and v: a slice where pages happen to be consecutive (no copy), else an int64 index."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where one chunk writes and reads in the pages of one KV group."""

    write: Rows
    read: Rows
    first: int
    """Position of the first key read: 0, or where the window of the chunk's first query begins."""


class KVCache:
    """All layers' pages. Not zeroed between uses: a row is always written before it is read."""

    def __init__(
        self, spec: ModelSpec, pages: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._device = device
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.windows = tuple(group.window for group in spec.kv_groups)
        for group, count in zip(spec.kv_groups, pages, strict=True):
            for layer in group.layers:
                mixer = spec.layers[layer].mixer
                shape = (mixer.kv_heads, count * KV_PAGE_TOKENS, mixer.head_dim)
                self.keys[layer] = torch.empty(shape, dtype=dtype, device=device)
                self.values[layer] = torch.empty(shape, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return 2 * sum(k.nbytes for k in self.keys.values())

    def spans(self, tables: Sequence[Sequence[int]], start: int, tokens: int) -> tuple[Span, ...]:
        """One span a group, for a chunk of `tokens` tokens at position `start`."""
        end = start + tokens
        spans = []
        for table, window in zip(tables, self.windows, strict=True):
            first = 0 if window is None else max(0, start - window + 1)
            spans.append(Span(self._rows(table, start, end), self._rows(table, first, end), first))
        return tuple(spans)

    def write(self, layer: int, rows: Rows, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store k and v [T, KH, D]."""
        self.keys[layer][:, rows] = k.transpose(0, 1).to(self.keys[layer].dtype)
        self.values[layer][:, rows] = v.transpose(0, 1).to(self.values[layer].dtype)

    def read(self, layer: int, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v [KH, S, D]."""
        return self.keys[layer][:, rows], self.values[layer][:, rows]

    def _rows(self, table: Sequence[int], first: int, end: int) -> Rows:
        pages = table[first // KV_PAGE_TOKENS : -(-end // KV_PAGE_TOKENS)]
        if min(pages) < 0:
            raise AssertionError(f"tokens {first}..{end} touch a page that was handed back")
        offset = first % KV_PAGE_TOKENS
        if all(page == pages[0] + i for i, page in enumerate(pages)):
            begin = pages[0] * KV_PAGE_TOKENS + offset
            return slice(begin, begin + end - first)
        starts = torch.tensor(pages, device=self._device) * KV_PAGE_TOKENS
        rows = (starts[:, None] + torch.arange(KV_PAGE_TOKENS, device=self._device)).flatten()
        return rows[offset : offset + end - first]
