"""Sequences with and without an adapter through the runner, against the reference's."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch

from octavo.errors import IncompatibleModelError
from octavo.runners.base import Adapter, Batch, SlotState
from octavo.runners.cuda.layout import CUDA_B64
from octavo.runners.cuda.runner import CudaRunner
from octavo.types import Sampling

IDS = (5, 9, 2, 7)


def random_adapter(made: object, seed: int = 5) -> Adapter:
    source = np.random.default_rng(seed)
    addends = {}
    for parameter in made.parameters:  # type: ignore[attr-defined]
        if parameter.role == "matrix":
            rows, columns = parameter.shape
            rank = int(source.integers(1, 6))
            a = source.normal(0, columns**-0.5, (rank, columns)).astype(np.float32)
            addends[parameter.name] = (a, source.normal(0, 0.5, (rows, rank)).astype(np.float32))
    return Adapter("d" * 64, addends)


def test_rows_have_their_own_adapter(tiny_models: ModuleType, device: torch.device) -> None:
    attention = tiny_models.attention(heads=2, kv_heads=1, head_dim=16, rope=tiny_models.rope(8))
    spec = tiny_models.model(
        tiny_models.layer(attention, tiny_models.DenseMLP(32, "silu")), hidden_size=64, vocab_size=96
    )
    config = replace(
        tiny_models.runner_config(spec),
        device="cuda:0" if device.type == "cuda" else "cpu",
        compute_dtype="float16",  # the interpreter multiplies bfloat16 as the integers of its bits
        kv_dtype="float16",
        threads=None,
    )
    made = tiny_models.make_tiny(spec)
    runner = CudaRunner(spec, made.open(CUDA_B64), config)
    reference = made.reference()
    adapter = random_adapter(made)
    drive = tiny_models.Driver(spec, runner)
    for each in (runner, reference):
        each.load_adapter("fine", adapter)
        for slot, name in enumerate(("fine", None, "fine")):
            each.open_slot(slot, SlotState(IDS, len(IDS), Sampling(temperature=0.0), name))

    def logits(feed: int, *slots: int) -> tuple[np.ndarray, np.ndarray]:
        """Ours and the reference's of rows that are fed: whole prompts but their last token, or that token."""
        ours, theirs = [], []
        for slot in slots:
            ours.append(drive.chunk(slot, 0, IDS[:-1]) if feed == 0 else drive.chunk(slot, feed, None))
            theirs.append(drive.chunk(slot, feed, IDS[:-1] if feed == 0 else IDS[-1:]))
        runner.forward(Batch(tuple(ours)))
        reference.forward(Batch(tuple(theirs)))
        return (
            np.stack([runner.logits(slot) for slot in slots]),
            np.stack([reference.logits(slot) for slot in slots]),
        )

    def error(got: np.ndarray, want: np.ndarray) -> float:
        return float(np.linalg.norm(got - want) / np.linalg.norm(want))

    got, want = logits(0, 0, 1, 2)
    assert error(got, want) < 0.02
    assert error(got[0], got[1]) > 0.3
    got, want = logits(3, 0, 1)  # a batch of which one row has it
    assert error(got, want) < 0.02
    got, want = logits(3, 2)  # alone
    assert error(got, want) < 0.02
    assert runner.memory()["adapters"] == adapter_bytes(adapter)
    with pytest.raises(AssertionError, match="in use"):
        runner.drop_adapter("fine")
    for slot in range(3):
        runner.close_slot(slot)
    runner.drop_adapter("fine")
    assert runner.memory()["adapters"] == 0
    broken = {"layers.0.mixer.q.weight": (np.ones((1, 3), np.float32), np.ones((32, 1), np.float32))}
    with pytest.raises(IncompatibleModelError, match="which is 32 x 64"):
        runner.load_adapter("broken", Adapter("0" * 64, broken))
    runner.close()


def adapter_bytes(adapter: Adapter) -> int:
    return sum(a.nbytes + b.nbytes for a, b in adapter.addends.values())
