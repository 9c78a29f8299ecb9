"""Two threads on two cores of which another process takes one: decode speed against one thread undisturbed.

    python benchmarks/cpu/busy_neighbor.py [MODEL] [--quant int8] [--rounds 7]

Threads that wait for each other by spinning fall to a fraction of one thread's speed here. This process and its
neighbor, an endless loop, share the first two CPUs the process may use. Rounds are interleaved; the ratio is taken
within a round.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from octavo import LLM, SamplingParams
from octavo.settings import QuantName

NEW_TOKENS = 48
_PROMPT = list(range(1000, 1016))


@dataclass(frozen=True)
class Round:
    """Tokens a second."""

    one_thread: float
    two_threads: float
    two_threads_beside: float
    one_thread_beside: float

    @property
    def kept(self) -> float:
        """The requirement's ratio: two threads beside a busy process over one thread alone."""
        return self.two_threads_beside / self.one_thread


@contextlib.contextmanager
def neighbor() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def decode_speed(llm: LLM) -> float:
    params = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    speed = llm.generate(_PROMPT, params).timings.decode_tokens_per_second
    assert speed is not None
    return speed


def measure(model: str | None, quant: QuantName, rounds: int) -> list[Round]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:2])
    try:
        with (
            LLM(model, quant=quant, device="cpu", context=128, threads=1) as one,
            LLM(model, quant=quant, device="cpu", context=128, threads=2) as two,
        ):
            found = []
            for _ in range(rounds):
                alone = decode_speed(one), decode_speed(two)
                with neighbor():
                    found.append(Round(*alone, decode_speed(two), decode_speed(one)))
            return found
    finally:
        os.sched_setaffinity(0, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="default: the default model")
    parser.add_argument("--quant", default="int8")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    found = measure(arguments.model, arguments.quant, arguments.rounds)
    for name, values in {
        "1 thread": [each.one_thread for each in found],
        "2 threads": [each.two_threads for each in found],
        "2 threads, busy neighbor": [each.two_threads_beside for each in found],
        "1 thread, busy neighbor": [each.one_thread_beside for each in found],
        "2 threads beside / 1 alone": [each.kept for each in found],
    }.items():
        print(f"{name:28} {statistics.median(values):8.2f}  ({min(values):.2f} .. {max(values):.2f})")


if __name__ == "__main__":
    main()
