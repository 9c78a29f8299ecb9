"""Runs every test of the CUDA runner on the card at hand and prints one table: outcomes by file.

    python benchmarks/cuda/suite.py [--workers 8] [pytest's own arguments]

Workers share the card: most of the time is compiling. The kernel tests of tests/runners_cuda run compiled here, not
interpreted; those that need no card are left to CI.
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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seconds", type=float, help="stop then, and say what ran")
    options, more = parser.parse_known_args()
    tests = ROOT / "tests"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += ["-n", str(options.workers), *more, str(tests / "gpu"), str(tests / "runners_cuda")]
        command += ["--ignore", str(tests / "runners_cuda" / "test_compile.py")]
        started = time.perf_counter()
        try:
            status = subprocess.run(command, cwd=ROOT, check=False, timeout=options.seconds).returncode
        except subprocess.TimeoutExpired:
            status = 124
        seconds = time.perf_counter() - started
        if not report.exists():
            print(f"no report after {seconds:.0f} s, status {status}")
            return status or 1
        counts, failures = outcomes(report)
    print(f"\n{'':44s}" + "".join(f"{kind:>9s}" for kind in KINDS))
    for name in sorted(counts):
        print(f"{name:44s}" + "".join(f"{counts[name][kind]:9d}" for kind in KINDS))
    every = [sum(each[kind] for each in counts.values()) for kind in KINDS]
    print(f"{f'all, {seconds:.0f} s':44s}" + "".join(f"{count:9d}" for count in every))
    print("\n".join(failures))
    return status


if __name__ == "__main__":
    sys.exit(main())
