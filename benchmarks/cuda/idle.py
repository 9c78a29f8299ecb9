"""What the host costs a greedy sequence on the card: the engine's rate against its own graphs', and the idle time.

    python benchmarks/cuda/idle.py FOLDER [--rounds 5]

FOLDER is a checkpoint (`engine.py --make`). Rates are medians, interleaved; the graphs are replayed from the same
position with nobody reading tokens. Idle time is from torch.profiler's kernels of one more generation: time in which
none ran, and the part of it between a step's last kernel and the next one's first, which is the host's.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from octavo import LLM, SamplingParams

PROMPT = list(range(100, 228))
TOKENS = 256
GREEDY = SamplingParams(max_new_tokens=TOKENS, temperature=0, ignore_eos=True)


def bare_rate(runner: Any) -> float:
    """Tokens/s of the engine's own two graphs."""
    graphs = {key[0]: graph for key, graph in runner._graphs._graphs.items() if key[1].rows == 1 and graph}
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    runner._positions.fill_(len(PROMPT))
    begin.record()
    for _ in range(TOKENS):
        graphs["forward"].replay()
        graphs["pick"].replay()
    end.record()
    torch.cuda.synchronize()
    return TOKENS / begin.elapsed_time(end) * 1e3


def idle_shares(llm: LLM) -> tuple[float, float, int]:
    """Of the time of decoding: without any kernel; of it, between steps; and how many steps were seen."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        llm.generate(PROMPT, GREEDY)
        torch.cuda.synchronize()
    found = profile.profiler.kineto_results.events()
    kernels = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
        for event in found
        if event.device_type() == torch.autograd.DeviceType.CUDA and "_kernel" in event.name()
    )
    steps = [index for index, kernel in enumerate(kernels) if "pick_kernel" in kernel[2]][8:-8]
    kernels = kernels[steps[0] : steps[-1] + 1]
    idle = between = 0
    busy_until = kernels[0][1]
    after_pick = True
    for start, end, name in kernels[1:]:
        gap = max(0, start - busy_until)
        idle += gap
        between += gap if after_pick else 0
        after_pick = "pick_kernel" in name
        busy_until = max(busy_until, end)
    span = busy_until - kernels[0][1]
    return idle / span, between / span, len(steps) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with LLM(arguments.folder, device="cuda", context=1024) as llm:
        runner = llm._driver.backend._engine._runner  # type: ignore[attr-defined]
        llm.generate(PROMPT, GREEDY)
        rates = []
        for _ in range(arguments.rounds):
            rate = llm.generate(PROMPT, GREEDY).timings.decode_tokens_per_second
            rates.append((rate or 0.0, bare_rate(runner)))
        ours, bare = (statistics.median(column) for column in zip(*rates, strict=True))
        shares = [one / other for one, other in rates]
        print(
            f"{torch.cuda.get_device_name()}: {ours:.1f} tok/s through LLM.generate, {bare:.1f} of bare replay: "
            f"{statistics.median(shares):.3f} ({min(shares):.3f} .. {max(shares):.3f})"
        )
        idle, between, steps = idle_shares(llm)
        print(f"profiled {steps} steps: {idle:.2%} without a kernel, {between:.2%} between steps")


if __name__ == "__main__":
    main()
