"""Writers that are killed, processes that race, and the memory packing takes: seen from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="forks, and reads Linux's /proc"
)

SCRIPT = Path(__file__).with_name("processes.py")
SINGLE_THREADED = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def run(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, env=SINGLE_THREADED, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_killed_at_100_points_of_a_write(tmp_path):
    seen = run("kill", tmp_path, 100)
    assert seen["lines"] > 300
    assert seen["killed"] == 100
    # The control: kills hit the middle of writes and their ends, not only before or after.
    assert seen["interrupted"] >= 25
    assert seen["complete"] >= 5


@pytest.mark.parametrize("mode", ["locked", "unlocked", "pruned"])
@pytest.mark.parametrize("rounds", [4, pytest.param(50, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])])
def test_eight_processes_at_once(tmp_path, mode, rounds):
    packed = run("race", tmp_path, mode, 8, rounds)
    if mode == "locked":
        assert packed == {"fewest": 1, "most": 1}, "one process packs, seven find its entry"
    else:
        assert packed["fewest"] >= 1
        assert packed["most"] > 1, "without locks the race is real"


def resident_bytes(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def test_packing_takes_the_memory_of_one_bundle(tmp_path):
    """Of a packed model of 96 MiB no more than its largest bundle, 33 MiB, is in memory at a time."""
    command = [sys.executable, str(SCRIPT), "pack", str(tmp_path)]
    with subprocess.Popen(
        command, env=SINGLE_THREADED, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.stdin.write("\n")
        child.stdin.close()
        peak = 0
        while child.poll() is None:
            peak = max(peak, resident_bytes(child.pid, "RssAnon:"))
            time.sleep(0.002)
        found = json.loads(child.stdout.read())
    assert child.returncode == 0
    mebibyte = 1 << 20
    assert found["stored"] > 96 * mebibyte
    assert (
        found["largest"] * 0.9 < peak - found["baseline"] < found["largest"] + 24 * mebibyte
    )  # two would be 33 more
    assert found["after"] - found["baseline"] < 16 * mebibyte, "what is loaded are the file's own pages"
