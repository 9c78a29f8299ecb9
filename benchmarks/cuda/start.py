"""From a process's start to its first token: packed weights, everything in the page cache, kernels compiled before.

    python benchmarks/cuda/start.py FOLDER [--model gemma-2-2b] [--rounds 5]

Makes a random checkpoint of the shape where there is none. Every start is a process of its own, and says when each
part had ended; the first one, which packs the weights and compiles, is not counted. The table has medians and ranges,
of seconds since the process was started.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_STARTED = "OCTAVO_BENCHMARK_STARTED"


def child(folder: str) -> None:
    """One start; prints when its parts had ended."""
    begin, ended = float(os.environ[_STARTED]), {}

    def end(part: str) -> None:
        ended[part] = time.time() - begin

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any, **named: Any) -> Any:
            result = function(*values, **named)
            end(part)
            return result

        return call

    end("interpreter")
    from octavo import LLM, SamplingParams, llm, loading
    from octavo.runners.cuda import kind

    end("octavo imported")
    llm.plan_model = timed("planned", llm.plan_model)
    loading.stored_weights = timed("weights verified", loading.stored_weights)
    kind.CudaRunnerKind.create = timed("weights on the card", kind.CudaRunnerKind.create)
    with LLM(folder, device="cuda", context=1024) as loaded:
        end("loaded")
        loaded.generate(list(range(100, 164)), SamplingParams(max_new_tokens=1, temperature=0))
        end("first token")
    print(json.dumps(ended))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="gemma-2-2b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(str(arguments.folder))
        return
    if not (arguments.folder / "tokenizer.json").exists():
        making = [sys.executable, Path(__file__).with_name("engine.py"), arguments.folder, "--make"]
        subprocess.run([*making, "--model", arguments.model], check=True)
    rounds: list[dict[str, float]] = []
    for index in range(arguments.rounds + 1):
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        command = [sys.executable, __file__, str(arguments.folder), "--child"]
        done = subprocess.run(
            command,
            env=environment | {_STARTED: repr(time.time())},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        if index:
            rounds.append(found)
        print(f"start {index}: first token after {found['first token']:.2f} s", flush=True)
    for part in rounds[0]:
        seconds = [found[part] for found in rounds]
        print(f"{part:20} {statistics.median(seconds):6.2f} s  ({min(seconds):.2f} .. {max(seconds):.2f})")


if __name__ == "__main__":
    main()
