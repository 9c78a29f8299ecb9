"""The runner's own part, with a tiny model: rows of prompts and of decoding sequences sampled together."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch

from octavo.engine import sampling as law
from octavo.runners.base import Batch
from octavo.runners.cuda.layout import CUDA_B64
from octavo.runners.cuda.runner import CudaRunner
from octavo.runners.masks import unpack_mask
from octavo.types import Sampling

GREEDY = Sampling(temperature=0.0)
DRAWN = Sampling(temperature=1.2, top_k=30, top_p=0.9, seed=5, frequency_penalty=0.5, logprobs=3)


def test_rows_of_all_kinds_are_sampled_together(tiny_models: ModuleType, device: torch.device) -> None:
    attention = tiny_models.attention(heads=2, kv_heads=1, head_dim=16, rope=tiny_models.rope(8))
    spec = tiny_models.model(
        tiny_models.layer(attention, tiny_models.DenseMLP(32, "silu")), hidden_size=64, vocab_size=96
    )
    config = replace(
        tiny_models.runner_config(spec),
        device="cuda:0" if device.type == "cuda" else "cpu",
        compute_dtype="bfloat16",
        kv_dtype="bfloat16",
        threads=None,
    )
    runner = CudaRunner(spec, tiny_models.make_tiny(spec).open(CUDA_B64), config)
    drive = tiny_models.Driver(spec, runner)
    prompts = {0: [5, 9, 2], 1: [7, 1, 8, 8], 2: [3, 3]}
    samplings = {0: GREEDY, 1: DRAWN, 2: GREEDY}
    ids = {slot: list(prompt) for slot, prompt in prompts.items()}
    start = dict.fromkeys(prompts, 0)

    def step(*slots: int, masks: dict[int, np.ndarray] | None = None) -> None:
        chunks = []
        for slot in slots:
            fed = ids[slot][start[slot] :] if start[slot] == 0 else None
            if start[slot] == 0:
                drive.open(slot, ids[slot], samplings[slot])
            chunks.append(drive.chunk(slot, start[slot], fed, sample=True))
        batch = Batch(tuple(chunks))
        runner.forward(batch)
        rows = {slot: runner.logits(slot) for slot in slots}
        found = runner.sample(batch, masks).result().tokens
        for slot, (sampled,) in zip(slots, found, strict=True):
            counts = law.TokenCounts.of(ids[slot], len(prompts[slot]), spec.vocab_size)
            allowed = unpack_mask(masks[slot], spec.vocab_size) if masks and slot in masks else None
            want = law.sample_token(rows[slot], samplings[slot], len(ids[slot]), counts, allowed)
            assert sampled.token_id == want
            assert (sampled.logprob is None) == (slot != 1)
            if sampled.logprob is not None:
                expected = law.token_logprob(rows[slot], want, 3)
                assert sampled.logprob.logprob == pytest.approx(expected.logprob, abs=1e-4)
                assert [i for i, _ in sampled.logprob.top] == [i for i, _ in expected.top]
            start[slot] = len(ids[slot])
            ids[slot].append(want)

    step(0)
    step(0)  # plainly greedy: `pick`
    step(1, 0)
    step(0, 1, 2)
    only = np.zeros(3, np.uint32)
    only[1] = 0b1100
    step(0, 2, masks={2: only})
    assert ids[2][-1] in (34, 35)
    runner.close()


def test_prompt_logprobs_are_the_rows(tiny_models: ModuleType, device: torch.device) -> None:
    spec = tiny_models.MODELS["plain"]
    config = replace(
        tiny_models.runner_config(spec),
        device="cuda:0" if device.type == "cuda" else "cpu",
        compute_dtype="bfloat16",
        kv_dtype="bfloat16",
        threads=None,
    )
    runner = CudaRunner(spec, tiny_models.make_tiny(spec).open(CUDA_B64), config)
    drive = tiny_models.Driver(spec, runner)
    drive.open(0, [4, 6, 9])
    chunk = drive.chunk(0, 0, [4, 6, 9], sample=False, targets=(6, 9, -1), top_logprobs=2)
    (found,) = runner.forward(Batch((chunk,))).result().prompt_logprobs
    assert found is not None
    assert [entry.token_id for entry in found] == [6, 9]
    assert all(len(entry.top) == 2 for entry in found)
    assert all(entry.top[0][1] >= entry.top[1][1] for entry in found)
    assert runner.sample(Batch((chunk,))).result().tokens == (), "no chunk of the batch samples"
    runner.close()
