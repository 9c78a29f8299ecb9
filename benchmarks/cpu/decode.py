"""The bare CPU runner: tokens a second of decode and prefill, beside the bandwidth measured in the same run.

    python benchmarks/cpu/decode.py [MODEL] [--quant int8] [--threads 1 2] [--activations int16 int8]
        [--peer LLAMA-BENCH=MODEL.gguf]

Rounds are interleaved (every configuration, and every peer, once a round), and medians with their spread are
printed, so that what else the machine does falls on all alike. `--peer` runs llama.cpp's llama-bench, built for
this machine, on a file of the same format.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from octavo.models import build_model
from octavo.models.spec import KV_PAGE_TOKENS, ModelSpec
from octavo.runners.base import Batch, Chunk, RunnerConfig, SlotState
from octavo.runners.cpu.kind import CpuRunnerKind
from octavo.runners.cpu.library import IsaName, read_bandwidth
from octavo.runners.cpu.runner import CpuRunner
from octavo.settings import ActivationsName
from octavo.sources.resolve import resolve
from octavo.types import Sampling
from octavo.weights import WeightStore, choose_formats, open_weights

CONTEXT_TOKENS = 2560
SEQUENCES = 8
DECODE_TOKENS = 32
LONG_CONTEXT = 2048
OURS = "octavo"


@dataclass(frozen=True)
class Loaded:
    spec: ModelSpec
    weights: WeightStore
    kind: CpuRunnerKind

    @property
    def token_bytes(self) -> int:
        """Of weights one token reads: all but the table, unless the head is the table."""
        table = 0 if self.spec.tied_head else self.weights["embedding"].arrays["embedding"].nbytes
        return self.weights.nbytes - table

    def runner(self, threads: int) -> CpuRunner:
        pages = (SEQUENCES * CONTEXT_TOKENS // KV_PAGE_TOKENS,) * len(self.spec.kv_groups)
        config = RunnerConfig(
            "cpu", "float32", "float16", CONTEXT_TOKENS, SEQUENCES, pages, 512, threads=threads
        )
        runner = self.kind.create(self.spec, self.weights, config)
        assert isinstance(runner, CpuRunner)
        for slot in range(SEQUENCES):
            runner.open_slot(slot, SlotState([1], 1, Sampling(temperature=0.0)))
        return runner

    def tables(self, slot: int) -> tuple[tuple[int, ...], ...]:
        pages = CONTEXT_TOKENS // KV_PAGE_TOKENS
        return (tuple(range(slot * pages, (slot + 1) * pages)),) * len(self.spec.kv_groups)


def load(model: str | None, quant: str, isa: IsaName | None) -> Loaded:
    source = resolve(model)
    spec, parameters = build_model(source.config, source.naming)
    kind = CpuRunnerKind(isa)
    weights = open_weights(
        model=source.location,
        fingerprint=source.fingerprint,
        tensors=source.tensors,
        parameters=parameters,
        formats=choose_formats(parameters, source.tensors, quant),
        layout=kind.layout,
        cache_dir=None,
        use_cache=True,
    )
    return Loaded(spec, weights, kind)


def decode(loaded: Loaded, runner: CpuRunner, context: int, sequences: int) -> float:
    """Tokens a second of all sequences together, from a context that is filled with whatever the pages hold."""
    tables = [loaded.tables(slot) for slot in range(sequences)]
    begin = time.perf_counter()
    for step in range(DECODE_TOKENS):
        chunks = tuple(
            Chunk(slot, context + step, None, tables[slot], sample=True) for slot in range(sequences)
        )
        batch = Batch(chunks)
        runner.forward(batch).result()
        runner.sample(batch).result()
    return sequences * DECODE_TOKENS / (time.perf_counter() - begin)


def prefill(loaded: Loaded, runner: CpuRunner, tokens: int) -> float:
    ids = tuple(3 + i * 7 % (loaded.spec.vocab_size - 3) for i in range(tokens))
    batch = Batch((Chunk(0, 0, ids, loaded.tables(0), sample=True),))
    begin = time.perf_counter()
    runner.forward(batch).result()
    return tokens / (time.perf_counter() - begin)


def llama_bench(command: str, threads: int) -> dict[str, float]:
    """Case -> tokens a second, of `llama-bench=model.gguf`."""
    program, _, file = command.partition("=")
    tests = ["-p", "128,512", "-n", str(DECODE_TOKENS), "-r", "1", "-o", "json"]
    found = subprocess.run([program, "-m", file, "-t", str(threads), *tests], capture_output=True, check=True)
    rows = json.loads(found.stdout)
    names = {(0, DECODE_TOKENS): "decode", (128, 0): "prefill 128", (512, 0): "prefill 512"}
    return {names[row["n_prompt"], row["n_gen"]]: float(row["avg_ts"]) for row in rows}


def measure(
    loaded: Loaded,
    threads: Sequence[int],
    activations: Sequence[ActivationsName],
    rounds: int,
    peers: Sequence[str],
) -> dict[tuple[str, str, int], list[float]]:
    """(who, case, threads) -> tokens a second (bytes a second for bandwidth), one a round."""
    kinds = {name: CpuRunnerKind(loaded.kind.isa, name) for name in activations}
    runners = {
        (count, name): replace(loaded, kind=kind).runner(count)
        for count in threads
        for name, kind in kinds.items()
    }
    cases: dict[str, Callable[[CpuRunner], float]] = {
        "prefill 128": lambda runner: prefill(loaded, runner, 128),
        "prefill 512": lambda runner: prefill(loaded, runner, 512),
        "decode": lambda runner: decode(loaded, runner, 1, 1),
        f"decode at {LONG_CONTEXT}": lambda runner: decode(loaded, runner, LONG_CONTEXT, 1),
        f"decode, {SEQUENCES} sequences": lambda runner: decode(loaded, runner, 1, SEQUENCES),
    }
    found: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for _ in range(rounds):
        for count in threads:
            found["memory", "bandwidth", count].append(read_bandwidth(count))
            for name, case in cases.items():
                for chosen in activations:
                    who = OURS if chosen == "int16" else f"{OURS}, {chosen} activations"
                    found[who, name, count].append(case(runners[count, chosen]))
            for peer in peers:
                for name, rate in llama_bench(peer, count).items():
                    found[peer.rpartition("/")[2], name, count].append(rate)
    for runner in runners.values():
        runner.close()
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="default: the default model")
    parser.add_argument("--quant", default="int8")
    parser.add_argument("--isa", choices=["portable", "avx2", "avx512"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--activations", nargs="+", default=["int16"], choices=["int16", "int8"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", action="append", default=[], metavar="LLAMA-BENCH=MODEL.gguf")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    loaded = load(arguments.model, arguments.quant, arguments.isa)
    found = measure(loaded, arguments.threads, arguments.activations, arguments.rounds, arguments.peer)
    if arguments.json:
        rows = [{"who": w, "case": c, "threads": t, "rates": rates} for (w, c, t), rates in found.items()]
        print(json.dumps({"isa": loaded.kind.isa, "token_bytes": loaded.token_bytes, "rows": rows}))
        return
    print(f"{arguments.quant}, {loaded.kind.isa}, {loaded.token_bytes / 1e6:.1f} MB of weights a token")
    print(f"{'who':28} {'case':20} {'threads':>7} {'median':>9} {'least':>9} {'most':>9}  share of bandwidth")
    for (who, case, count), rates in found.items():
        scale, unit = (1e9, "GB/s") if who == "memory" else (1, "")
        middle = statistics.median(rates)
        print(
            f"{who:28} {case:20} {count:7} {middle / scale:9.1f} {min(rates) / scale:9.1f}"
            f" {max(rates) / scale:9.1f} {unit}",
            end="",
        )
        if who.startswith(OURS) and case == "decode":
            bandwidth = statistics.median(found["memory", "bandwidth", count])
            print(f"  {middle * loaded.token_bytes / bandwidth:.0%}", end="")
        print()


if __name__ == "__main__":
    main()
