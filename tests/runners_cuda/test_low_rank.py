"""Adapters' addends: rows with one, another and none in a batch, and a chunk's rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from octavo.errors import IncompatibleModelError
from octavo.runners.base import Adapter
from octavo.runners.cuda.device_model import DeviceModel, Linear
from octavo.runners.cuda.low_rank import MOST_RANK, Adapters, add_low_rank, reference

LINEAR = Linear((), (("q", 130), ("k", 20), ("v", 20)), 72)
"""Members of unequal heights, none a whole block; K is no whole block either."""


def adapter(seed: int, **ranks: int) -> Adapter:
    source = np.random.default_rng(seed)
    rows = dict(LINEAR.members)

    def normal(*shape: int) -> np.ndarray:
        return source.normal(0, 1, shape).astype(np.float32)

    return Adapter("0" * 64, {name: (normal(r, 72), normal(rows[name], r)) for name, r in ranks.items()})


def make(device: torch.device) -> Adapters:
    model = cast(DeviceModel, SimpleNamespace(linears=(LINEAR,)))
    return Adapters(model, 5, device)


def addend(x: torch.Tensor, chosen: Adapter | None) -> torch.Tensor:
    """fp32 [T, 170]."""
    found = torch.zeros((len(x), 170))
    first = 0
    for name, rows in LINEAR.members:
        if chosen is not None and name in chosen.addends:
            a, b = map(torch.from_numpy, chosen.addends[name])
            found[:, first : first + rows] = reference(x.cpu().float()[:, :72], a, b)
        first += rows
    return found


def test_a_batch_of_adapters(randn: Any, device: torch.device) -> None:
    adapters = make(device)
    loaded = {"wide": adapter(1, q=20, v=3), "gone": adapter(2, q=2), "thin": adapter(3, k=1)}
    for name, chosen in loaded.items():
        adapters.load(name, chosen)
    adapters.drop("gone")
    of_slot = {0: "wide", 2: None, 3: "thin", 4: "wide"}
    for slot, name in of_slot.items():
        adapters.bind(slot, name)
    slots = torch.tensor([3, 4, 2, 0], dtype=torch.int32, device=device)
    x, base = randn(4, 128), randn(4, 180)
    out = base.clone()
    adapters.add_rows(LINEAR, x, out[:, 5:175], slots)
    added = (out - base).cpu()
    for row, slot in enumerate(slots.tolist()):
        name = of_slot[slot]
        want = addend(x[row : row + 1], None if name is None else loaded[name])
        assert torch.allclose(added[row, 5:175], want[0], atol=1e-4)
    assert not added[:, [0, 4, 175, 179]].any()
    assert not added[2].any()


def test_a_chunk(randn: Any, device: torch.device) -> None:
    adapters = make(device)
    chosen = adapter(1, q=4, v=3)
    adapters.load("fine", chosen)
    x, out = randn(6, 128), torch.zeros((6, 170), device=device)
    add_low_rank(LINEAR, x, out, adapters.of("fine"))
    add_low_rank(LINEAR, x, out, adapters.of(None))
    assert torch.allclose(out.cpu(), addend(x, chosen), atol=1e-4)
    assert adapters.nbytes == 4 * (4 * 72 + 130 * 4 + 3 * 72 + 20 * 3)


def test_a_place_is_free_again_and_ranks_have_a_bound(device: torch.device) -> None:
    adapters = make(device)
    adapters.load("a", adapter(1, q=4))
    adapters.drop("a")
    adapters.load("b", adapter(1, k=4))
    adapters.bind(0, "b")
    out = torch.zeros((1, 170), device=device)
    adapters.add_rows(
        LINEAR, torch.ones((1, 128), device=device), out, torch.zeros(1, dtype=torch.int32, device=device)
    )
    assert not out[:, :130].any()
    assert out[:, 130:150].all()
    with pytest.raises(IncompatibleModelError, match="rank 513"):
        adapters.load("high", adapter(1, q=MOST_RANK + 1))
