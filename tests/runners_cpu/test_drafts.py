"""Speculation: drafts, right and wrong, change neither a token nor a logprob, only how many come of one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from octavo.quant.affine import INT8, Q4_1
from octavo.quant.format import Format
from octavo.quant.plain import Plain
from octavo.runners.base import Batch, Sampled
from octavo.types import Sampling

STEPS = 40
MOST_DRAFTS = 5
SAMPLINGS = (
    Sampling(temperature=0.0, logprobs=2),
    Sampling(temperature=0.9, seed=5, top_p=0.9, logprobs=0),
    Sampling(temperature=1.1, seed=2**50, repetition_penalty=1.2, frequency_penalty=0.4, logprobs=3),
    Sampling(temperature=0.7, seed=7, top_k=9, min_p=0.01),
)


def decode(driver: Any, slot: int, prompt: Sequence[int], sampling: Sampling, steps: int) -> list[Sampled]:
    """One token a step, alone."""
    driver.open(slot, prompt, sampling)
    chunk, found = driver.chunk(slot, 0, prompt), []
    for step in range(steps):
        driver.runner.forward(Batch((chunk,)))
        (sampled,) = driver.runner.sample(Batch((chunk,))).result().tokens[0]
        found.append(sampled)
        chunk = driver.chunk(slot, len(prompt) + step, None)
    return found


@pytest.mark.parametrize("format", [INT8, Q4_1], ids=lambda chosen: chosen.name)
@pytest.mark.parametrize(("threads", "chunk_tokens"), [(1, 512), (2, 64), (3, 4)])
def test_drafts_change_nothing(
    isa: Any,
    format: Format,
    threads: int,
    chunk_tokens: int,
    models: Any,
    tiny: Callable[..., Any],
    drive: Callable[..., Any],
    tokens: Callable[..., Any],
) -> None:
    spec = models(96, 160, window=33)
    made = tiny(spec, format)
    prompts = [tokens(20 + 9 * slot, seed=slot) for slot in range(len(SAMPLINGS))]
    want = [
        decode(drive(spec, made.native(isa)), slot, prompts[slot], sampling, STEPS + MOST_DRAFTS)
        for slot, sampling in enumerate(SAMPLINGS)
    ]
    source = np.random.default_rng(threads)
    driver = drive(spec, made.native(isa, threads=threads, chunk=chunk_tokens))
    found: list[list[Sampled]] = [[] for _ in SAMPLINGS]
    for slot, sampling in enumerate(SAMPLINGS):
        driver.open(slot, prompts[slot], sampling)
    chunks = [driver.chunk(slot, 0, prompt) for slot, prompt in enumerate(prompts)]
    kept = drafted = 0
    while chunks:
        batch = Batch(tuple(chunks))
        driver.runner.forward(batch)
        results = driver.runner.sample(batch).result().tokens
        for chunk, sampled in zip(chunks, results, strict=True):
            drafts = chunk.token_ids[-chunk.drafts :] if chunk.drafts else ()
            assert 1 <= len(sampled) <= 1 + chunk.drafts
            assert all(s.token_id == d for s, d in zip(sampled[:-1], drafts, strict=False))
            kept, drafted = kept + len(sampled) - 1, drafted + chunk.drafts
            found[chunk.slot] += sampled
        chunks = []
        for slot, done in enumerate(found):
            if len(done) >= STEPS:
                continue
            drafts = [
                s.token_id for s in want[slot][len(done) : len(done) + source.integers(0, MOST_DRAFTS + 1)]
            ]
            if drafts and source.random() < 0.6:
                wrong = source.integers(0, len(drafts))
                drafts[wrong] = (drafts[wrong] + 1) % spec.vocab_size
            start = len(prompts[slot]) + len(done) - 1
            fed = [done[-1].token_id, *drafts] if drafts else None
            chunks.append(driver.chunk(slot, start, fed, drafts=len(drafts)))
    for slot, expected in enumerate(want):
        assert found[slot] == expected[: len(found[slot])]
    assert 0 < kept < drafted


def test_drafts_after_a_prompt(
    isa: Any, models: Any, tiny: Callable[..., Any], drive: Callable[..., Any], tokens: Callable[..., Any]
) -> None:
    """A chunk may end a prompt and go on with drafts, also where it is computed in parts."""
    spec = models(72, 88)
    made, ids, sampling = tiny(spec), tokens(30), Sampling(temperature=0.0, logprobs=1)
    want = decode(drive(spec, made.native(isa)), 0, ids, sampling, 6)
    drafts = [s.token_id for s in want[:5]]
    for chunk_tokens in (512, 8):
        driver = drive(spec, made.native(isa, slots=1, chunk=chunk_tokens))
        driver.open(0, ids, sampling)
        batch = Batch((driver.chunk(0, 0, [*ids, *drafts], drafts=5),))
        driver.runner.forward(batch)
        assert list(driver.runner.sample(batch).result().tokens[0]) == want


def test_drafts_and_masks_do_not_go_together(
    isa: Any, models: Any, tiny: Callable[..., Any], drive: Callable[..., Any]
) -> None:
    spec = models(72, 88)
    driver = drive(spec, tiny(spec).native(isa))
    driver.open(0, (1, 2))
    batch = Batch((driver.chunk(0, 0, (1, 2, 3), drafts=1),))
    driver.runner.forward(batch)
    with pytest.raises(AssertionError, match="drafts"):
        driver.runner.sample(batch, masks={0: np.zeros(7, np.uint32)})


def test_replaced_logits_reach_only_their_slot(
    isa: Any, models: Any, tiny: Callable[..., Any], drive: Callable[..., Any], tokens: Callable[..., Any]
) -> None:
    spec = models(72, 88)
    driver = drive(spec, tiny(spec).native(isa))
    for slot in (0, 1):
        driver.open(slot, tokens(9, seed=slot), Sampling(temperature=0.0, logprobs=1))
    batch = Batch(tuple(driver.chunk(slot, 0, tokens(9, seed=slot)) for slot in (0, 1)))
    driver.runner.forward(batch)
    model = driver.runner.logits(0), driver.runner.logits(1)
    replaced = np.zeros(spec.vocab_size, np.float32)
    replaced[17] = 1.0
    (first,), (second,) = driver.runner.sample(batch, logits={0: replaced}).result().tokens
    assert first.token_id == 17
    assert first.logprob.top[0][0] == model[0].argmax() != 17
    assert second.token_id == model[1].argmax()


@pytest.mark.parametrize("activations", ["int16", "int8"])
def test_info_names_the_kernels(
    isa: Any, activations: str, models: Any, tiny: Callable[..., Any], drive: Callable[..., Any]
) -> None:
    spec = models(72, 88)
    kernels = drive(spec, tiny(spec).native(isa, activations=activations)).runner.info.kernels
    assert set(kernels) == {"int8 linears", "attention"}
    assert kernels["int8 linears"].endswith(f"{activations} activations")
    plain = drive(spec, tiny(spec, Plain("bf16")).native(isa, activations=activations)).runner.info.kernels
    assert plain["bf16 linears"].endswith("fp32 activations")
