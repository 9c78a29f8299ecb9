"""The reference's attention takes queries in blocks: where they are cut changes nothing."""

from __future__ import annotations

import pytest
import torch

from octavo.models.spec import Attention
from octavo.runners.reference import model

TOKENS, HEADS, KV_HEADS, DIM = 9, 4, 2, 8


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_blocks_of_any_size_give_the_same(monkeypatch, window, start, rows):
    """Down to one query at a time, as long contexts need: each still sees no token after its own."""
    generator = torch.Generator().manual_seed(0)
    first = 0 if window is None else max(0, start - window + 1)
    seen = start + TOKENS - first
    q = torch.randn(TOKENS, HEADS, DIM, generator=generator)
    keys, values = torch.randn(2, KV_HEADS, seen, DIM, generator=generator)
    mixer = Attention(HEADS, KV_HEADS, DIM, scale=0.3, rope=None, window=window)
    whole = model._attention(mixer, q, keys, values, start, first)
    monkeypatch.setattr(model, "SCORES_BLOCK_BYTES", rows * 4 * HEADS * seen)
    torch.testing.assert_close(model._attention(mixer, q, keys, values, start, first), whole)
