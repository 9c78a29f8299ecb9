"""Greedy choice on the device: ties, rows that are not finite, slots that move on."""

from __future__ import annotations

from typing import Any

import torch

from octavo.runners.cuda import pick as module
from octavo.runners.cuda.decode_attention import Sequences
from octavo.runners.cuda.pick import best_of_rows, pick


def test_rows_move_their_slots_on(device: torch.device, randn: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "PIECE_TOKENS", 16)
    logits = randn(4, 50)
    logits[0, [7, 40]] = 9.0  # a tie across pieces
    logits[1, 20] = torch.nan
    logits[2] = -torch.inf
    best = torch.zeros((4, 4), device=device)
    best_ids = torch.zeros((4, 4), dtype=torch.int32, device=device)
    pieces = best_of_rows(logits, best, best_ids)
    assert pieces == 4
    ints = {"dtype": torch.int32, "device": device}
    positions, last = torch.full((6,), 10, **ints), torch.full((6,), 3, **ints)
    sequences = Sequences(torch.tensor([4, 2, 0, 5], **ints), positions, (), 5)
    sampled = torch.zeros(4, **ints)
    pick(best, best_ids, pieces, sequences, sampled, last, pdl=False)
    assert sampled.tolist() == [7, -1, -1, int(logits[3].argmax())]
    assert positions.tolist() == [11, 10, 11, 10, 11, 10]  # the spare slot stays
    assert last.tolist() == [0, 3, 0, 3, 7, 3]
