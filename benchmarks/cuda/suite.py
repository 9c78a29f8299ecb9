"""Runs every test of the CUDA runner on the card at hand and prints one table: outcomes by file.

    python benchmarks/cuda/suite.py [--workers 8] [pytest's own arguments]

Workers share the card: most of the time is compiling. What fills the card, or counts all of its memory, runs alone
afterwards. The kernel tests of tests/runners_cuda run compiled here, not interpreted; those that need no card are left
to CI.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
KINDS = ("passed", "failed", "skipped")


def outcomes(report: Path) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Counts by test file, and one line for each failure, from a JUnit report."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(KINDS, 0))
    failures = []
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("classname") or "?"
        broken = next((found for tag in ("failure", "error") if (found := case.find(tag)) is not None), None)
        kind = "failed" if broken is not None else "skipped" if case.find("skipped") is not None else "passed"
        counts[name][kind] += 1
        if broken is not None:
            said = (broken.get("message") or "").strip().splitlines()
            failures.append(f"{name}.{case.get('name')}: {said[0] if said else '?'}")
    return counts, failures


def run(tests: list[str], report: Path, seconds: float | None) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    try:
        return subprocess.run(command, cwd=ROOT, check=False, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return 124


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seconds", type=float, help="stop each part then")
    parser.add_argument("--parts", default="together,alone")
    options, more = parser.parse_known_args()
    gpu, kernels = ROOT / "tests" / "gpu", ROOT / "tests" / "runners_cuda"
    alone = gpu / "test_memory.py"
    needless = kernels / "test_compile.py"
    parts = {
        "together": [
            "-n",
            str(options.workers),
            f"--ignore={alone}",
            f"--ignore={needless}",
            str(gpu),
            str(kernels),
        ],
        "alone": [str(alone)],
    }
    counts: dict[str, dict[str, int]] = {}
    failures: list[str] = []
    started, worst = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts.split(","):
            report = Path(folder) / f"{part}.xml"
            status = run([*parts[part], *more], report, options.seconds)
            worst = max(worst, status)
            if report.exists():
                found, broken = outcomes(report)
                counts |= found
                failures += broken
            else:
                failures.append(f"{part}: no report, status {status}")
    print(f"\n{'':44s}" + "".join(f"{kind:>9s}" for kind in KINDS))
    for name in sorted(counts):
        print(f"{name:44s}" + "".join(f"{counts[name][kind]:9d}" for kind in KINDS))
    every = [sum(each[kind] for each in counts.values()) for kind in KINDS]
    print(f"{f'all, {time.perf_counter() - started:.0f} s':44s}" + "".join(f"{count:9d}" for count in every))
    print("\n".join(failures))
    return worst


if __name__ == "__main__":
    sys.exit(main())
