"""A sequence's logits, tokens and logprobs are the same bits alone and in any batch, whole and in chunks, on any
number of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from octavo.models.spec import ModelSpec
from octavo.quant.affine import INT8, Q4_1
from octavo.quant.codebook import NF4
from octavo.quant.format import Format
from octavo.quant.plain import Plain
from octavo.runners.base import Batch
from octavo.types import Sampling

TOKENS = 141
THREADS = (1, 2, 3, 5)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


def run_chunks(driver: Any, slot: int, ids: Sequence[int], size: int) -> np.ndarray:
    """The last row's logits [V] after the prompt in chunks of `size` tokens."""
    for start in range(0, len(ids), size):
        rows = driver.logits(driver.chunk(slot, start, ids[start : start + size]))
    return rows[0]


def test_chunks_and_threads(
    isa: Any, spec: ModelSpec, tiny: Callable[..., Any], drive: Callable[..., Any], tokens: Callable[..., Any]
) -> None:
    made = tiny(spec)
    ids = tokens(TOKENS, vocabulary=spec.vocab_size)
    driver = drive(spec, made.native(isa))
    driver.open(0, ids)
    want = run_chunks(driver, 0, ids, 1)
    assert np.isfinite(want).all()
    for threads, size in zip(THREADS, (TOKENS, 64, 17, 1), strict=True):
        other = drive(spec, made.native(isa, threads=threads))
        other.open(0, ids)
        assert same_bits(run_chunks(other, 0, ids, size), want), (threads, size)


@pytest.mark.parametrize(
    ("format", "activations"),
    [(INT8, "int16"), (INT8, "int8"), (Q4_1, "int16"), (NF4, "int16"), (Plain("bf16"), "int16")],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_alone_and_in_a_batch(
    isa: Any,
    format: Format,
    activations: str,
    models: Any,
    tiny: Callable[..., Any],
    drive: Callable[..., Any],
    tokens: Callable[..., Any],
) -> None:
    """Prefill chunks and decode tokens of several sequences in one batch, split where rows run out."""
    spec = models(96, 160)
    made = tiny(spec, format)
    lengths = (3, 130, 37, 80)
    prompts = [tokens(n, seed=n) for n in lengths]
    alone = []
    for slot, ids in enumerate(prompts):
        driver = drive(spec, made.native(isa, activations=activations))
        driver.open(slot, ids)
        alone.append([run_chunks(driver, slot, ids[:n], n) for n in (len(ids), len(ids) - 1)])
    for threads, chunk in ((1, 512), (2, 64), (5, 7)):
        driver = drive(spec, made.native(isa, threads=threads, chunk=chunk, activations=activations))
        for slot, ids in enumerate(prompts):
            driver.open(slot, ids)
        part = driver.logits(*(driver.chunk(slot, 0, ids[:-1]) for slot, ids in enumerate(prompts)))
        whole = driver.logits(*(driver.chunk(slot, len(ids) - 1, None) for slot, ids in enumerate(prompts)))
        for slot in range(len(prompts)):
            assert same_bits(part[slot], alone[slot][1]), (threads, slot)
            assert same_bits(whole[slot], alone[slot][0]), (threads, slot)


def test_pages_behind_the_window_may_be_gone(
    isa: Any, models: Any, tiny: Callable[..., Any], drive: Callable[..., Any], tokens: Callable[..., Any]
) -> None:
    spec = models(72, 88, window=40)
    made = tiny(spec)
    ids = tokens(300)
    driver = drive(spec, made.native(isa, threads=2))
    driver.open(0, ids)
    want = run_chunks(driver, 0, ids, 300)
    for size in (1, 25):
        driver = drive(spec, made.native(isa, threads=2))
        driver.open(0, ids)
        for start in range(0, len(ids), size):
            chunk = driver.chunk(0, start, ids[start : start + size])
            first_needed = max(0, start - 39) // 32
            table = (-1,) * first_needed + chunk.page_tables[0][first_needed:]
            (got,) = driver.logits(replace(chunk, page_tables=(table,)))
        assert same_bits(got, want)


def test_sampled_tokens_and_logprobs(
    isa: Any, models: Any, tiny: Callable[..., Any], drive: Callable[..., Any], tokens: Callable[..., Any]
) -> None:
    spec = models(72, 88, window=33)
    made = tiny(spec)
    sampling = [Sampling(temperature=0.9, seed=2**40 + i, top_p=0.9, logprobs=3) for i in range(4)]
    prompts = [tokens(20 + 9 * i, seed=i) for i in range(4)]

    def generate(driver: Any, slots: Sequence[int], steps: int) -> dict[int, list[Any]]:
        found: dict[int, list[Any]] = {slot: [] for slot in slots}
        for slot in slots:
            driver.open(slot, prompts[slot], sampling[slot])
        chunks = [driver.chunk(slot, 0, prompts[slot]) for slot in slots]
        for step in range(steps):
            batch = Batch(tuple(chunks))
            driver.runner.forward(batch)
            for slot, (sampled,) in zip(slots, driver.runner.sample(batch).result().tokens, strict=True):
                assert sampled.token_id == sampled.logprob.token_id
                found[slot].append(sampled)
            chunks = [driver.chunk(slot, len(prompts[slot]) + step, None) for slot in slots]
        return found

    together = generate(drive(spec, made.native(isa, threads=3)), range(4), 60)
    for slot in range(4):
        assert generate(drive(spec, made.native(isa)), [slot], 60)[slot] == together[slot]
    assert together[0] != together[1]


def test_prompt_logprobs_do_not_depend_on_chunks(
    isa: Any, models: Any, tiny: Callable[..., Any], drive: Callable[..., Any], tokens: Callable[..., Any]
) -> None:
    spec = models(72, 88)
    made = tiny(spec)
    ids = tokens(90)
    targets = (*ids[1:], -1)

    def score(size: int, threads: int) -> list[Any]:
        driver = drive(spec, made.native(isa, threads=threads, chunk=40))
        driver.open(0, ids)
        found: list[Any] = []
        for start in range(0, len(ids), size):
            part = slice(start, start + size)
            chunk = driver.chunk(0, start, ids[part], sample=False, targets=targets[part], top_logprobs=4)
            (logprobs,) = driver.runner.forward(Batch((chunk,))).result().prompt_logprobs
            found += logprobs
        return found

    want = score(90, 1)
    assert len(want) == 89
    assert score(1, 2) == want
    assert score(33, 5) == want


def test_the_comparison_can_fail(
    isa: Any, models: Any, tiny: Callable[..., Any], drive: Callable[..., Any], tokens: Callable[..., Any]
) -> None:
    """One changed token far back changes the bits of a later row."""
    spec = models(72, 88)
    made = tiny(spec)
    ids = list(tokens(TOKENS))
    first, second = drive(spec, made.native(isa)), drive(spec, made.native(isa))
    first.open(0, ids)
    want = run_chunks(first, 0, ids, TOKENS)
    ids[2] = (ids[2] + 1) % spec.vocab_size
    second.open(0, ids)
    assert not same_bits(run_chunks(second, 0, ids, TOKENS), want)


def test_a_sequence_that_is_not_finite_fails_alone(
    isa: Any, tiny: Callable[..., Any], drive: Callable[..., Any], tokens: Callable[..., Any], flags: Any
) -> None:
    """Token 7's row overflows in the norm: its sequence gets -1, its neighbour the bits it gets alone."""
    spec = flags["layernorm"]
    made = tiny(spec, Plain("f32"))
    made.tensors["model.embed_tokens.weight"].values[7] = 3e38
    ids = [i if i != 7 else 8 for i in tokens(40)]
    broken = [*ids[:20], 7, *ids[20:]]
    alone = drive(spec, made.native(isa))
    alone.open(1, ids)
    want = alone.logits(alone.chunk(1, 0, ids))[0]

    driver = drive(spec, made.native(isa, threads=2))
    driver.open(0, broken)
    driver.open(1, ids)
    batch = Batch((driver.chunk(0, 0, broken), driver.chunk(1, 0, ids)))
    got = driver.logits(*batch.chunks)
    assert np.isnan(got[0]).all()
    assert same_bits(got[1], want)
    (first,), (second,) = driver.runner.sample(batch).result().tokens
    assert first.token_id == -1
    assert first.logprob is None
    assert second.token_id == want.argmax()
