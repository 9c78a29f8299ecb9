"""Octavo beside what else runs a checkpoint on the card at hand, interleaved: tokens/s, GB/s, share of a stream read.

    python benchmarks/cuda/contenders.py [--models gemma-2-2b,...] [--formats int8,llm-int8] [--batches 1]
        [--peers bf16,compiled,torchao,bitsandbytes,script] [--json FILE]

Makes a random checkpoint of each shape as a user's folder would be, starts every contender in a process of its own,
all at once (what they compile, they compile together), and then lets one work at a time, round after round. A rate is
(N - 1) tokens over the time of N less the median time of one, by the wall clock of the caller. The error is the rms
difference of a prompt's log-probabilities from those of transformers in fp32, over their spread.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoints import make_checkpoint
from shapes import SHAPES, stream_bytes_per_second

PEERS = ("bf16", "compiled", "torchao", "bitsandbytes", "script")
SLOW = ("transformers:bitsandbytes", "transformers:script")
"""Some ten tokens/s: an eighth of the tokens will do."""


class ContenderError(Exception):
    """What a contender's process said before it ended."""


class Process:
    """A contender's process. `start` returns at once; `ready` is set when it is loaded and warm, or has failed."""

    def __init__(self, name: str, hello: dict[str, Any], prompts: list[list[int]], new_tokens: int) -> None:
        self.name = name
        self.new_tokens = new_tokens
        self.facts: dict[str, Any] = {}
        self.failure: str | None = None
        self.ready = threading.Event()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("contender_child.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        threading.Thread(target=self._warm_up, args=(hello, prompts), daemon=True).start()

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Raises ContenderError."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise ContenderError(answer["error"])
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def _warm_up(self, hello: dict[str, Any], prompts: list[list[int]]) -> None:
        try:
            self.facts = self.ask(hello)
            started = time.perf_counter()
            if prompts:
                self.ask({"prompts": prompts, "new_tokens": self.new_tokens})
                self.facts["warm_seconds"] = time.perf_counter() - started
        except ContenderError as error:
            self.failure = str(error)
        self.ready.set()

    def _last_words(self) -> str:
        status = self._process.wait()
        try:
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines()
        except ValueError:  # closed by `close`, which ended the process
            return "it was ended"
        return lines[-1].strip() if lines else f"its process ended with status {status}"


@dataclass
class Found:
    """Of one contender on one model at one batch size."""

    facts: dict[str, Any]
    decoded: int
    """Tokens of a round but the first ones, all sequences together."""
    first_seconds: list[float] = field(default_factory=list)
    total_seconds: list[float] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)
    error: float | None = None

    @property
    def rates(self) -> list[float]:
        """Tokens/s, one a round. The first token's time is the median: it would be half of the noise."""
        first = statistics.median(self.first_seconds)
        return [self.decoded / (total - first) for total in self.total_seconds]


def prompts_of(sequences: int, tokens: int, vocabulary: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(4, vocabulary) for _ in range(tokens)] for _ in range(sequences)]


REFERENCE = "transformers:fp32"


def scores_of(process: Process, prompt: list[int]) -> list[float]:
    return list(process.ask({"prompts": [prompt], "new_tokens": 0})["logprobs"][0])


def relative_error(got: list[float], want: list[float]) -> float:
    count = min(len(got), len(want))  # Octavo also scores what follows the beginning, where there is one
    a, b = torch.tensor(got[-count:]), torch.tensor(want[-count:])
    return float((a - b).pow(2).mean().sqrt() / b.std())


def measure(
    folder: Path, name: str, batch: int, contenders: list[str], options: argparse.Namespace
) -> tuple[dict[str, Found], dict[str, str], list[float]]:
    """What was found by contender, why others were not measured, and stream reads, bytes/s, one a round."""
    vocabulary, length = SHAPES[name].vocabulary, options.prompt_tokens
    hello = {
        "folder": str(folder),
        "context": length + options.new_tokens,
        "sequences": batch,
        "device": "cuda:0",
    }
    (scored,) = prompts_of(1, length, vocabulary, 7)

    def start(contender: str, new_tokens: int) -> Process:
        prompts = prompts_of(batch, length, vocabulary, 1000) if new_tokens else []
        return Process(contender, {**hello, "contender": contender}, prompts, new_tokens)

    want: list[float] | None = None
    processes: list[Process] = []
    deadline = time.monotonic() + options.warm_seconds
    try:
        if not options.no_error:
            processes.append(start(REFERENCE, 0))
            if options.error_first:
                processes[0].ready.wait()
                want = scores_of(processes[0], scored)
                processes.pop().close()
                deadline = time.monotonic() + options.warm_seconds
        for contender in contenders:
            few = max(9, options.new_tokens // 8)
            processes.append(start(contender, few if contender in SLOW else options.new_tokens))
        running, failed = wait_for(processes, deadline, options.warm_seconds)
        if running and running[0].name == REFERENCE:
            want = scores_of(running[0], scored)
            running.pop(0).close()
        found = {each.name: Found(each.facts, batch * (each.new_tokens - 1)) for each in running}
        streams = []
        for number in range(options.rounds):
            prompts = prompts_of(batch, length, vocabulary, number)
            # Back and forth, so that a drift of the card falls on all alike.
            for process in running if number % 2 == 0 else reversed(running):
                answer = process.ask({"prompts": prompts, "new_tokens": process.new_tokens})
                found[process.name].first_seconds.append(answer.pop("first_token_seconds"))
                found[process.name].total_seconds.append(answer.pop("total_seconds"))
                found[process.name].more = answer
            streams.append(stream_bytes_per_second())
            torch.cuda.empty_cache()
        for process in running if want is not None else ():
            found[process.name].error = relative_error(scores_of(process, scored), want or [])
        return found, failed, streams
    finally:
        for process in processes:
            process.close()


def wait_for(
    processes: list[Process], deadline: float, seconds: float
) -> tuple[list[Process], dict[str, str]]:
    """Those that are loaded and warm, and why the others, which are ended, are not."""
    running: list[Process] = []
    failed: dict[str, str] = {}
    for process in processes:
        if not process.ready.wait(max(0.0, deadline - time.monotonic())):
            failed[process.name] = f"not loaded and warm after {seconds} s"
        elif process.failure is not None:
            failed[process.name] = process.failure
        else:
            running.append(process)
            continue
        process.close()
    return running, failed


def table(found: dict[str, Found], batch: int, stream: float) -> list[str]:
    lines = [
        f"{'':26s} {'tok/s':>9s} {'(least .. most)':>19s} {'GB/s':>6s} {'share':>6s} {'TTFT ms':>8s} {'error':>7s} "
        f"{'load s':>7s} {'warm s':>7s} {'GiB':>6s} {'frames':>6s}"
    ]
    for name, one in found.items():
        rate = statistics.median(one.rates)
        read = rate / batch * one.facts["weight_bytes"]
        frames = one.more.get("compiled_frames")
        lines.append(
            f"{name:26s} {rate:9.1f} {min(one.rates):9.1f} .. {max(one.rates):<6.1f} {read / 1e9:6.0f} "
            f"{read / stream:6.1%} {1e3 * statistics.median(one.first_seconds):8.1f} "
            f"{'-' if one.error is None else f'{one.error:.4f}':>7s} {one.facts['load_seconds']:7.1f} "
            f"{one.facts['warm_seconds']:7.1f} {one.more['device_bytes'] / 2**30:6.2f} "
            f"{'-' if frames is None else frames:>6}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "octavo-shapes")
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--formats", default="int8,llm-int8", help="of Octavo, as --quant has them")
    parser.add_argument("--peers", default=",".join(PEERS), help="of transformers; empty: Octavo alone")
    parser.add_argument("--batches", default="1")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-seconds", type=float, default=600, help="who is not ready then is left out")
    parser.add_argument("--no-error", action="store_true", help="skip the fp32 model")
    parser.add_argument("--error-first", action="store_true", help="where the fp32 model fits only alone")
    parser.add_argument("--json", type=Path, help="write everything there too")
    options = parser.parse_args()
    if unknown := set(filter(None, options.peers.split(","))) - set(PEERS):
        parser.error(f"unknown peers: {', '.join(sorted(unknown))}")
    # Packed weights stay beside the checkpoints; the kernels' compilers keep their own caches.
    os.environ.setdefault("OCTAVO_CACHE", str(options.folder / "packed"))
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, {date}", flush=True)
    contenders = [f"octavo:{each}" for each in options.formats.split(",") if each]
    contenders += [f"transformers:{each}" for each in options.peers.split(",") if each]
    report = []
    for name in options.models.split(","):
        folder = options.folder / name
        make_checkpoint(folder, name)
        torch.cuda.empty_cache()
        for batch in map(int, options.batches.split(",")):
            found, failed, streams = measure(folder, name, batch, contenders, options)
            stream = statistics.median(streams)
            print(
                f"\n{name}, batch {batch}, {options.prompt_tokens} + {options.new_tokens} tokens, "
                f"{options.rounds} rounds, stream read {stream / 1e12:.2f} TB/s"
            )
            print("\n".join(table(found, batch, stream)))
            for contender, why in failed.items():
                print(f"{contender:26s} not measured: {why}")
            for version in dict.fromkeys(one.facts["version"] for one in found.values()):
                print(f"  {version}", flush=True)
            results = {
                who: {
                    **one.facts,
                    **one.more,
                    "tokens_per_second": one.rates,
                    "first_token_seconds": one.first_seconds,
                    "error": one.error,
                }
                for who, one in found.items()
            }
            report.append(
                {
                    "model": name,
                    "batch": batch,
                    "stream_bytes_per_second": streams,
                    "found": results,
                    "failed": failed,
                }
            )
    if options.json is not None:
        about = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "date": date}
        options.json.write_text(json.dumps(about | {"results": report}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
