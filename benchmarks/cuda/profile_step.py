"""Where a decode step's time goes, by kernel: Nsight Compute's microseconds and share of the memory's peak.

    python benchmarks/cuda/profile_step.py [--model gemma-2-2b] [--format int8] [--batch 1] [--context 128] [--layers 4]

Needs ncu on PATH and leave to read the counters. Kernels run one by one, with the caches as the one before left them:
what programmatic launches overlap in a graph is not seen, so the sum is more than a step takes (`decode.py`). Layers
are alike: a few are enough for the time of each kernel.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

TIME, DRAM = "gpu__time_duration.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed"
READ = "dram__bytes_read.sum"
CHILD = "OCTAVO_PROFILED"


@dataclass
class Kernel:
    launches: int = 0
    seconds: float = 0.0
    read_bytes: float = 0.0
    share_seconds: float = 0.0
    """Of the peak, times seconds: for the mean over time."""


def launch(options: argparse.Namespace) -> None:
    """One step between the profiler's marks, after one that compiles."""
    import torch
    from decode import Decoder
    from shapes import FORMATS, SHAPES, random_model

    context = 32 * (-(-(options.context + 128) // 32))
    shape = SHAPES[options.model]
    shape = replace(shape, layers=options.layers or shape.layers)
    model = random_model(shape, FORMATS[options.format], max(8192, context))
    decoder = Decoder(model, max(512, context), options.batch)
    for profiled in (False, True):
        decoder.start(options.context)
        torch.cuda.synchronize()
        if profiled:
            torch.cuda.cudart().cudaProfilerStart()
        decoder.step.forward()
        decoder.step.pick()
        torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def kernels(lines: list[str]) -> Iterator[tuple[str, dict[str, float]]]:
    """(name and grid, metrics) of every launch, in order, from ncu's CSV."""
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        raise SystemExit("\n".join(["ncu printed no table:", *lines[-20:]]))
    found: dict[str, tuple[str, dict[str, float]]] = {}
    for row in csv.DictReader(lines[first:]):
        grid = "x".join(re.findall(r"\d+", row.get("Grid Size", ""))).replace("x1x1", "")
        name = f"{row['Kernel Name'].partition('(')[0]} [{grid}]"
        _, metrics = found.setdefault(row["ID"], (name, {}))
        metrics[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    yield from found.values()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gemma-2-2b")
    parser.add_argument("--format", default="int8")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--layers", type=int, help="of all that the model has")
    options = parser.parse_args()
    if os.environ.get(CHILD):
        launch(options)
        return
    command = [
        "ncu",
        "--csv",
        "--print-units",
        "base",
        "--profile-from-start",
        "off",
        "--clock-control",
        "none",
    ]
    command += ["--cache-control", "none", "--metrics", f"{TIME},{DRAM},{READ}", sys.executable, *sys.argv]
    done = subprocess.run(command, env=os.environ | {CHILD: "1"}, capture_output=True, text=True, check=False)
    by_name: dict[str, Kernel] = defaultdict(Kernel)
    for name, metrics in kernels((done.stdout + done.stderr).splitlines()):
        kernel, seconds = by_name[name], metrics[TIME] / 1e9
        kernel.launches += 1
        kernel.seconds += seconds
        kernel.read_bytes += metrics[READ]
        kernel.share_seconds += metrics[DRAM] * seconds
    every = sum(kernel.seconds for kernel in by_name.values())
    print(
        f"{options.model} {options.format} B{options.batch} context {options.context}: {every * 1e6:.0f} us in all"
    )
    print(
        f"{'kernel [grid]':44s} {'times':>6s} {'us each':>8s} {'us':>8s} {'share':>6s} {'DRAM %':>7s} {'MB read':>8s}"
    )
    for name, kernel in sorted(by_name.items(), key=lambda pair: -pair[1].seconds):
        print(
            f"{name[:44]:44s} {kernel.launches:6d} {kernel.seconds / kernel.launches * 1e6:8.2f} "
            f"{kernel.seconds * 1e6:8.1f} {kernel.seconds / every:6.1%} {kernel.share_seconds / kernel.seconds:7.1f} "
            f"{kernel.read_bytes / 1e6:8.1f}"
        )


if __name__ == "__main__":
    main()
