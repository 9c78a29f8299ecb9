"""The engine's own time a step: everything but the runner, which here does nothing.

    python benchmarks/engine/scheduler.py [--sequences 32] [--rounds 9] [--profile]

Each sequence decodes from a prompt of 200 tokens; a round is 200 steps with all of them running. Printed: the
median of the rounds, with the least and the most.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Mapping
from typing import Any

from octavo.engine.engine import Engine
from octavo.models.spec import Attention, DenseMLP, LayerNorms, LayerSpec, ModelSpec, Norm
from octavo.runners.base import (
    Batch,
    Counters,
    Done,
    ForwardResult,
    RunnerConfig,
    RunnerInfo,
    Sampled,
    SampleResult,
    SlotState,
)
from octavo.types import Request, Sampling

PROMPT_TOKENS = 200
ROUND_STEPS = 200
CONTEXT_TOKENS = 8192


def spec(windows: tuple[int | None, ...]) -> ModelSpec:
    norm = Norm("rms", 1e-5)
    layers = tuple(
        LayerSpec(
            LayerNorms(norm, None, norm, None),
            Attention(heads=1, kv_heads=1, head_dim=2, scale=1.0, rope=None, window=window),
            DenseMLP(4, "silu"),
        )
        for window in windows
    )
    return ModelSpec("none", 1000, 2, layers, norm, CONTEXT_TOKENS, tied_head=True)


class IdleRunner:
    """Every token is 7; results are made once for each number of chunks."""

    def __init__(self, config: RunnerConfig) -> None:
        self._config = config
        sampled = (Sampled(7, None),)
        slots = config.max_slots + 1
        self._forward = [Done(ForwardResult((None,) * count)) for count in range(slots)]
        self._sample = [Done(SampleResult((sampled,) * count)) for count in range(slots)]

    @property
    def info(self) -> RunnerInfo:
        config = self._config
        return RunnerInfo(
            "idle", "cpu", "none", "none", "none", config.max_slots, config.kv_pages, {}, True, True
        )

    def open_slot(self, slot: int, state: SlotState) -> None: ...
    def close_slot(self, slot: int) -> None: ...
    def close(self) -> None: ...

    def forward(self, batch: Batch) -> Done[ForwardResult]:
        return self._forward[len(batch.chunks)]

    def sample(self, batch: Batch, masks: Any = None, logits: Any = None) -> Done[SampleResult]:
        return self._sample[sum(chunk.sample for chunk in batch.chunks)]

    def memory(self) -> Mapping[str, int]:
        return {}

    def counters(self) -> Counters:
        return Counters()


def engine_with(sequences: int, windows: tuple[int | None, ...]) -> Engine:
    """All prompts are in, and every sequence has thousands of tokens to go."""
    model = spec(windows)
    groups = model.kv_groups
    pages = (sequences * CONTEXT_TOKENS // 32,) * len(groups)
    config = RunnerConfig("cpu", "float32", "float16", CONTEXT_TOKENS, sequences, pages, 512)
    engine = Engine(IdleRunner(config), config, model, "digest")  # type: ignore[arg-type]
    for number in range(sequences):
        engine.submit(Request((number + 1,) * PROMPT_TOKENS, Sampling(), CONTEXT_TOKENS - PROMPT_TOKENS))
    while len(engine.step(0)) < sequences:
        pass
    return engine


def step_microseconds(engine: Engine, sequences: int) -> float:
    began = time.thread_time()  # of the CPU: what else the machine does is not the engine's
    for _ in range(ROUND_STEPS):
        assert len(engine.step(0)) == sequences
    return (time.thread_time() - began) / ROUND_STEPS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    for name, windows in {"full attention": (None,), "full and a window of 512": (None, 512)}.items():
        for sequences in arguments.sequences:
            engine = engine_with(sequences, windows)
            if arguments.profile:
                with cProfile.Profile() as profile:
                    step_microseconds(engine, sequences)
                pstats.Stats(profile).sort_stats("tottime").print_stats(14)
            times = [step_microseconds(engine, sequences) for _ in range(arguments.rounds)]
            print(
                f"{name}, {sequences} sequences: {statistics.median(times):.0f} us a step "
                f"({min(times):.0f} .. {max(times):.0f})"
            )
            engine.close()


if __name__ == "__main__":
    main()
