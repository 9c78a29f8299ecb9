"""The CUDA runner on a card: against the reference on the same packed weights, its counters, its memory."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.models.spec import ModelSpec
from octavo.quant.affine import INT8, LLM_INT8, Q4_1, Q8_0
from octavo.quant.format import Format
from octavo.quant.plain import Plain
from octavo.runners.base import Batch
from octavo.runners.cuda.kind import CudaRunnerKind

pytestmark = pytest.mark.gpu

FLAGS = (
    "plain tied mha one-kv-head head-dim-64 head-dim-8 head-dim-256 partial-rotary no-rope attention-factor two-ropes "
    "window softcap biases qk-norm qk-norm-full post-norms only-post-norms layernorm gelu gelu-tanh not-gated "
    "multipliers odd-sizes"
).split()
FORMATS: tuple[Format, ...] = (LLM_INT8, Q8_0, Q4_1, Plain("f32"), Plain("f16"), Plain("bf16"))


def errors(
    models: ModuleType,
    spec: ModelSpec,
    format: Format,
    driven: ModelSpec | None = None,
    kv_dtype: str = "bfloat16",
) -> list[float]:
    """Relative errors of logits: of a prefill, of decode steps (eager, captured, replayed), of rows of a batch.

    `driven`: run that spec, compare with `spec`.
    """
    made = models.make_tiny(spec, format)
    ids = models.prompt(90, vocabulary=spec.vocab_size)
    start = len(ids) - 5
    want = models.Driver(spec, made.reference()).reference_logits(0, ids)
    config = replace(
        models.runner_config(spec),
        device="cuda:0",
        compute_dtype="bfloat16",
        kv_dtype=kv_dtype,
        threads=None,
    )
    kind = CudaRunnerKind()
    assert kind.declines(driven or spec, tuple(made.formats.values()), config) is None
    runner = kind.create(driven or spec, made.open(kind.layout), config)
    drive = models.Driver(spec, runner)
    found = []

    def compare(slot: int, row: int) -> None:
        found.append(float(np.linalg.norm(runner.logits(slot) - want[row]) / np.linalg.norm(want[row])))

    def forced(slot: int, at: int) -> Any:
        """A decode chunk that feeds the prompt's own token."""
        runner._last_tokens[slot] = ids[at]  # type: ignore[attr-defined]
        return drive.chunk(slot, at, None)

    drive.open(0, ids)
    runner.forward(Batch((drive.chunk(0, 0, ids[:40]),)))
    runner.forward(Batch((drive.chunk(0, 40, ids[40:start]),)))
    compare(0, start - 1)
    for at in range(start, len(ids)):
        runner.forward(Batch((forced(0, at),))).result()
        compare(0, at)
    for slot in (1, 2, 3):
        drive.open(slot, ids)
        runner.forward(Batch((drive.chunk(slot, 0, ids[: start - slot]),)))
    for step in range(3):
        runner.forward(Batch(tuple(forced(slot, start - slot + step) for slot in (1, 2, 3)))).result()
        for slot in (1, 2, 3):
            compare(slot, start - slot + step)
    runner.close()
    return found


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag(flag: str, models: ModuleType) -> None:
    assert max(errors(models, models.MODELS[flag], INT8)) < 0.04


@pytest.mark.parametrize("format", FORMATS, ids=lambda chosen: chosen.name)
def test_every_format(format: Format, models: ModuleType) -> None:
    layer = models.layer(models.attention(head_dim=32, rope=models.rope(16)), models.DenseMLP(96, "silu"))
    assert max(errors(models, models.model(layer, layer, hidden_size=64), format)) < 0.04


def test_a_changed_spec_changes_the_logits(models: ModuleType) -> None:
    """The bound above is tight enough to see a single wrong flag."""
    spec = models.MODELS["plain"]
    layers = tuple(replace(layer, mixer=replace(layer.mixer, scale=0.23)) for layer in spec.layers)
    assert min(errors(models, spec, INT8, replace(spec, layers=layers))) > 0.04


@pytest.mark.parametrize(
    "flag", "plain one-kv-head head-dim-64 head-dim-8 head-dim-256 window softcap".split()
)
def test_int8_keys_and_values(flag: str, models: ModuleType) -> None:
    assert max(errors(models, models.MODELS[flag], INT8, kv_dtype="int8")) < 0.08


# --- through LLM -------------------------------------------------------------------------------------


PROMPT = [(7 * i) % 512 for i in range(200)]


@pytest.fixture
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, device="cuda", cache=False, max_sequences=4) as llm:
        assert llm.info()["runner"] == "cuda"
        yield llm


def test_greedy_tokens_and_scores_are_the_references(folder: Path, llm: LLM) -> None:
    greedy = SamplingParams(max_new_tokens=64, temperature=0, ignore_eos=True, logprobs=2)
    with LLM(folder, device="cuda", dtype="float32", runner="reference", cache=False) as reference:
        want, want_scores = reference.generate(PROMPT, greedy), reference.score(PROMPT).logprobs
    got = llm.generate(PROMPT, greedy)
    assert llm.score(PROMPT).logprobs == pytest.approx(want_scores, abs=0.15)
    assert want.logprobs is not None
    assert got.logprobs is not None
    for token, mine, theirs in zip(want.token_ids, got.logprobs, want.logprobs, strict=True):
        gap = theirs.top[0][1] - theirs.top[1][1]
        if mine.token_id != token:
            assert gap < 0.1  # a near-tie; what follows is another text
            break
        assert mine.logprob == pytest.approx(theirs.logprob, abs=0.15)


def test_sampling_is_the_seeds(llm: LLM) -> None:
    def tokens(**more: Any) -> tuple[int, ...]:
        return llm.generate(PROMPT, SamplingParams(max_new_tokens=32, ignore_eos=True, **more)).token_ids

    drawn = tokens(temperature=1.5, seed=3)
    assert tokens(temperature=1.5, seed=3) == drawn
    assert tokens(temperature=1.5, seed=4) != drawn
    assert tokens(temperature=1.5, seed=4, top_k=1) == tokens(temperature=0)


def test_a_batch_gives_the_tokens_of_each_alone(llm: LLM) -> None:
    prompts = [PROMPT[: 20 + 9 * i] for i in range(6)]
    greedy = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)
    together = llm.generate(prompts, greedy)
    alone = [llm.generate(prompt, greedy) for prompt in prompts]
    same = [a.token_ids == b.token_ids for a, b in zip(together, alone, strict=True)]
    assert sum(same) >= 5  # a batch has other arithmetic: a near-tie may fall otherwise


def test_nothing_compiles_or_allocates_once_warm(llm: LLM) -> None:
    # Not at the top: where there is no card, another folder's tests choose the interpreter before this import.
    from octavo.runners.cuda.pick import best_of_rows_kernel

    def compiled() -> Any:
        return llm.info()["compiled"]

    def work(count: int) -> None:
        for _ in range(count):
            prompts = [PROMPT[: draw.randint(1, 180)] for _ in range(draw.randint(1, 4))]
            sampling = {"temperature": draw.choice([0.0, 0.8]), "top_p": draw.choice([1.0, 0.9])}
            llm.generate(
                prompts, SamplingParams(max_new_tokens=draw.randint(1, 20), ignore_eos=True, **sampling)
            )

    draw = random.Random(0)
    work(60)
    before = compiled()
    logits, ids = torch.zeros((1, 64), device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    best_of_rows_kernel[(1, 1)](logits, logits, ids, 64, BLOCK=64)  # pieces of a size that nothing else takes
    provoked = compiled()
    assert provoked["recompiles"] == before["recompiles"] + 1
    del logits, ids
    gc.collect()
    held = torch.cuda.memory_allocated()
    work(200)
    after = compiled()
    assert (after["captures"], after["recompiles"]) == (provoked["captures"], provoked["recompiles"])
    assert torch.cuda.memory_allocated() == held


def allocated_bytes() -> int:
    """Without cuBLAS workspaces: 32 MiB for each thread that ever multiplied, which torch keeps for the next one."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


@pytest.fixture
def int8_llm(folder: Path) -> Iterator[LLM]:
    """Eight sequences that share the pages of one context."""
    with LLM(folder, device="cuda", cache=False, context=256, kv_dtype="int8") as llm:
        yield llm


def test_int8_keys_and_values_take_half_the_memory(folder: Path, llm: LLM, int8_llm: LLM) -> None:
    assert int8_llm.info()["kv_dtype"] == "int8"
    with LLM(folder, device="cuda", cache=False, context=256) as wide:
        share = int8_llm.info()["memory"]["kv"] / wide.info()["memory"]["kv"]
    assert share == (32 + 4) / 64  # heads of 32
    want, got = llm.score(PROMPT).logprobs, int8_llm.score(PROMPT).logprobs
    assert got == pytest.approx(want, abs=0.5)
    assert got != want


def test_int8_keys_and_values_of_a_prefix_are_used_again(int8_llm: LLM) -> None:
    greedy = SamplingParams(max_new_tokens=24, temperature=0, ignore_eos=True)
    first, second = (int8_llm.generate(PROMPT, greedy) for _ in range(2))
    assert second.usage.cached_tokens >= 160
    assert second.token_ids[:8] == first.token_ids[:8]  # a shorter chunk has other arithmetic


def test_sequences_that_had_to_wait_go_on_with_int8(int8_llm: LLM) -> None:
    """Their pages are taken, and they are computed again."""
    prompts = [PROMPT[i : 60 + i] for i in range(6)]
    greedy = SamplingParams(max_new_tokens=60, temperature=0, ignore_eos=True)
    together = int8_llm.generate(prompts, greedy)
    alone = [int8_llm.generate(prompt, greedy) for prompt in prompts]
    same = [a.token_ids[:12] == b.token_ids[:12] for a, b in zip(together, alone, strict=True)]
    assert int8_llm.info()["engine"]["preemptions"] > 0
    assert all(len(done.token_ids) == 60 for done in together)
    # A batch, and a prompt read again, have other arithmetic: a near-tie may fall otherwise.
    assert sum(same) >= 4


def test_close_gives_device_memory_back(folder: Path) -> None:
    torch.zeros(1, device="cuda")
    before = allocated_bytes()
    for _ in range(3):
        with LLM(folder, device="cuda", cache=False) as llm:
            llm.generate(PROMPT, SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True))
    assert allocated_bytes() - before < 1 << 20
