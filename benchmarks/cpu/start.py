"""From a process's start to its first token: `octavo generate`, packed weights, everything in the page cache.

    python benchmarks/cpu/start.py [--rounds 15] [-- FLAGS OF OCTAVO GENERATE]

Wall time until the first byte of the answer and until the process has ended. The first run is not counted: it packs
the weights and writes Python's bytecode, which an installed package has (PYTHONDONTWRITEBYTECODE would compile every
module of a checkout again at each start, so it is unset).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

_PROMPT = "Why is the sky blue?"


def start(command: list[str]) -> tuple[float, float]:
    """Seconds to the first byte of standard output, and to the end."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    begin = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        first = time.perf_counter() - begin
        process.stdout.read()
        if process.wait() != 0:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return first, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("flags", nargs="*", help="of octavo generate")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "octavo", "generate", _PROMPT, "--max-new-tokens", "1", *arguments.flags]
    start(command)
    found = [start(command) for _ in range(arguments.rounds)]
    for name, seconds in zip(("first token", "end"), zip(*found, strict=True), strict=True):
        print(f"{name:12} {statistics.median(seconds):.3f} s  ({min(seconds):.3f} .. {max(seconds):.3f})")


if __name__ == "__main__":
    main()
