"""The engine under load on the CPU runner: what sharing the machine costs a request, and what it saves.

    python benchmarks/engine/load.py [MODEL] [--quant int8] [--threads 2] [--rounds 3] [--only CASE ...] [--cpu-time]

arrivals  eight requests, one every 50 ms, against the sum of their times alone
long      the longest time between two tokens of a sequence while a prompt of 1,500 tokens is fed beside it
prefix    a system prompt of 2,000 tokens: time to the first token of the second request, by the first's
batch     tokens a second of 1, 8 and 32 sequences together

Each round runs every case once; medians are printed, with the least and the most. `--cpu-time` counts seconds of the
process's CPU time, on one thread: for a machine that others use.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from octavo.engine.engine import Engine
from octavo.models import build_model
from octavo.models.spec import KV_PAGE_TOKENS, ModelSpec
from octavo.runners.base import RunnerConfig
from octavo.runners.cpu.kind import CpuRunnerKind
from octavo.sources.resolve import resolve
from octavo.types import Request, Sampling
from octavo.weights import WeightStore, choose_formats, open_weights

CONTEXT_TOKENS = 2560
ARRIVALS = 8
ARRIVAL_SECONDS = 0.05
SYSTEM_TOKENS = 2000


@dataclass(frozen=True)
class Loaded:
    spec: ModelSpec
    weights: WeightStore
    threads: int
    clock: Callable[[], float]

    def engine(self, slots: int, *, pages: int | None = None, reuse: bool = True) -> Engine:
        kv_pages = (pages or slots * CONTEXT_TOKENS // KV_PAGE_TOKENS,) * len(self.spec.kv_groups)
        config = RunnerConfig(
            "cpu", "float32", "float16", CONTEXT_TOKENS, slots, kv_pages, 512, threads=self.threads
        )
        runner = CpuRunnerKind(None).create(self.spec, self.weights, config)
        return Engine(runner, config, self.spec, "digest", reuse_prefixes=reuse)

    def request(self, seed: int, prompt: int | Iterable[int], new: int) -> Request:
        ids = self.tokens(seed, prompt) if isinstance(prompt, int) else prompt
        return Request(tuple(ids), Sampling(temperature=0.0, seed=seed), new)

    def tokens(self, seed: int, count: int) -> list[int]:
        return [3 + (i * 7919 + seed * 104729) % (self.spec.vocab_size - 3) for i in range(count)]


def load(model: str | None, quant: str, threads: int, clock: Callable[[], float]) -> Loaded:
    source = resolve(model)
    spec, parameters = build_model(source.config, source.naming)
    weights = open_weights(
        model=source.location,
        fingerprint=source.fingerprint,
        tensors=source.tensors,
        parameters=parameters,
        formats=choose_formats(parameters, source.tensors, quant),
        layout=CpuRunnerKind(None).layout,
        cache_dir=None,
        use_cache=True,
    )
    return Loaded(spec, weights, threads, clock)


@dataclass
class Run:
    """Times of one run, in seconds since its start."""

    submitted: list[float]
    tokens: list[list[float]]
    """When each token of each request came."""
    steps: list[tuple[float, float]]
    """When each step began and ended."""

    @property
    def seconds(self) -> float:
        return max(times[-1] for times in self.tokens) - self.submitted[0]

    def first(self, number: int) -> float:
        return self.tokens[number][0] - self.submitted[number]


def run(
    loaded: Loaded, engine: Engine, requests: Sequence[Request], at: Sequence[float] | None = None
) -> Run:
    """Submit each request at its time (None: all at once), step until all have ended."""
    at = at or [0.0] * len(requests)
    found = Run([], [[] for _ in requests], [])
    number_of: dict[int, int] = {}
    ended = 0
    clock = loaded.clock
    start = clock()
    while ended < len(requests):
        while len(number_of) < len(requests) and clock() - start >= at[len(number_of)]:
            found.submitted.append(clock() - start)
            number_of[engine.submit(requests[len(number_of)])] = len(found.submitted) - 1
        began = clock() - start
        events = engine.step(0)
        now = clock() - start
        if events:
            found.steps.append((began, now))
        for event in events:
            if event.error is not None:
                raise event.error
            if event.token_id is not None:
                found.tokens[number_of[event.request_id]].append(now)
            ended += event.finish_reason is not None
    return found


def arrivals(loaded: Loaded) -> dict[str, float]:
    engine = loaded.engine(ARRIVALS, reuse=False)
    requests = [loaded.request(seed, 64, 64) for seed in range(ARRIVALS)]
    solo = [run(loaded, engine, [request]) for request in requests]
    together = run(loaded, engine, requests, [i * ARRIVAL_SECONDS for i in range(ARRIVALS)])
    engine.close()
    last = ARRIVALS - 1
    in_between = sum(together.submitted[last] < end <= together.tokens[last][0] for _, end in together.steps)
    return {
        "together / sum of alone": together.seconds / sum(one.seconds for one in solo),
        "steps to the last one's first token, its prefill's included": in_between,
        "its time to the first token / alone": together.first(last) / solo[last].first(0),
    }


def long_prompt(loaded: Loaded) -> dict[str, float]:
    engine = loaded.engine(2, reuse=False)
    short, long = loaded.request(1, 16, 120), loaded.request(2, 1500, 1)
    alone = run(loaded, engine, [short])
    beside = run(loaded, engine, [short, long], [0.0, 0.1])
    engine.close()

    def longest(one: Run) -> float:
        return max(b - a for a, b in zip(one.tokens[0], one.tokens[0][1:], strict=False))

    return {
        "longest time between two tokens, alone, ms": longest(alone) * 1e3,
        "longest time between two tokens beside the prompt, ms": longest(beside) * 1e3,
        "the prompt's time to its first token, ms": beside.first(1) * 1e3,
    }


def prefix(loaded: Loaded) -> dict[str, float]:
    engine = loaded.engine(2)
    system = loaded.tokens(0, SYSTEM_TOKENS)
    first = run(loaded, engine, [loaded.request(1, [*system, *loaded.tokens(1, 20)], 4)])
    second = run(loaded, engine, [loaded.request(2, [*system, *loaded.tokens(2, 20)], 4)])
    engine.close()
    return {
        "first request's time to its first token, ms": first.first(0) * 1e3,
        "second request's / the first's": second.first(0) / first.first(0),
    }


def batch(loaded: Loaded) -> dict[str, float]:
    found = {}
    for sequences in (1, 8, 32):
        engine = loaded.engine(sequences, pages=sequences * 8, reuse=False)
        requests = [loaded.request(seed, 16, 48) for seed in range(sequences)]
        done = run(loaded, engine, requests)
        all_in = max(times[0] for times in done.tokens)
        tokens = sum(time > all_in for times in done.tokens for time in times)
        found[f"{sequences} sequences, tokens/s"] = tokens / (done.tokens[0][-1] - all_in)
        engine.close()
    return found


CASES: dict[str, Callable[[Loaded], dict[str, float]]] = {
    "arrivals": arrivals,
    "long": long_prompt,
    "prefix": prefix,
    "batch": batch,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", help="default: the default model")
    parser.add_argument("--quant", default="int8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    threads = 1 if arguments.cpu_time else arguments.threads
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    loaded = load(arguments.model, arguments.quant, threads, clock)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(arguments.rounds):
        for case in arguments.only:
            for name, value in CASES[case](loaded).items():
                found[case, name].append(value)
    for (case, name), values in found.items():
        middle = statistics.median(values)
        print(f"{case}: {name}: {middle:.3g} ({min(values):.3g} .. {max(values):.3g})")


if __name__ == "__main__":
    main()
