"""Run by test_processes.py in a process of its own: kills writers, races processes, packs a large model.

Children are forked from one warm, single-threaded interpreter, which is what makes hundreds of them cheap.
Each command prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from conftest import ArrayTensor, Checkpoint, assert_same, content, make_checkpoint

from octavo import file_lock
from octavo.file_lock import Lock
from octavo.models.parameters import Parameter
from octavo.weights import cache_entries, prune

TRACED = ("packed_cache.py", "packed_file.py", "file_lock.py")


def in_child(work: Callable[[], object]) -> int:
    """Fork; the child does the work and exits 0, or 1 with a traceback."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def at_line(number: int, action: Callable[[], object]) -> Callable[[], int]:
    """Do `action` at the number-th line executed in the cache's modules; returns a count of them."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.endswith(TRACED):
            return None
        if event == "line":
            count += 1
            if count == number:
                action()
        return trace

    sys.settrace(trace)
    return lambda: count


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def lines_and_seconds(checkpoint: Checkpoint, root: Path) -> tuple[int, float]:
    """How many lines, and how long, a whole write takes."""
    count = at_line(0, kill_self)
    checkpoint.open(root).close()
    sys.settrace(None)
    prune(root, everything=True)
    start = time.perf_counter()
    checkpoint.open(root).close()
    return count(), time.perf_counter() - start


def kill(root: Path, kills: int) -> dict[str, int]:
    """Kill writers at random lines and after random times, and look at what the next process finds."""
    checkpoint = make_checkpoint()
    expected = content(checkpoint.open(None))
    lines, seconds = lines_and_seconds(checkpoint, root)
    chance = random.Random(0)
    seen = {"lines": lines, "killed": 0, "interrupted": 0, "complete": 0}
    turn = 0
    while seen["killed"] < kills:
        turn += 1
        prune(root, everything=True)
        assert not list((root / "packed").iterdir())

        def write(line: int = chance.randint(1, lines) if turn % 2 else 0) -> None:
            at_line(line, kill_self)
            checkpoint.open(root)

        pid = in_child(write)
        if not turn % 2:
            time.sleep(chance.uniform(0, 1.5 * seconds))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        seen["killed"] += os.WIFSIGNALED(status)
        suffixes = sorted(path.suffix for path in (root / "packed").iterdir())
        seen["interrupted"] += ".tmp" in suffixes or suffixes == [".safetensors"]
        visible = cache_entries(root)
        seen["complete"] += len(visible)
        store = checkpoint.open(root)
        assert store.from_cache == bool(visible), "an entry that can be seen is whole"
        assert store.notices == ()
        assert_same(content(store), expected)
        store.close()
        left = sorted(path.suffix for path in (root / "packed").iterdir())
        assert left == [".json", ".safetensors"], left
    return seen


def race(root: Path, mode: str, processes: int, rounds: int) -> dict[str, int]:
    """Open one model from many processes at once; mode "unlocked" has no locks, "pruned" also a pruner."""
    checkpoint = make_checkpoint(rows=64, columns=256, layers=4)
    memory = checkpoint.open(None)
    expected, digest = content(memory), memory.digest
    if mode != "locked":
        file_lock._try_lock = lambda path: (Lock.UNSUPPORTED, None)
    packed_in_a_round = []
    for _ in range(rounds):
        prune(root, everything=True)
        gate, release = os.pipe()
        report, told = os.pipe()

        def open_together(gate: int = gate, release: int = release, told: int = told) -> None:
            os.close(release)
            os.read(gate, 1)
            store = checkpoint.open(root)
            assert_same(content(store), expected)
            assert store.digest == digest
            os.write(told, b"." if store.from_cache else b"P")

        def prune_meanwhile(gate: int = gate, release: int = release) -> None:
            os.close(release)
            os.read(gate, 1)
            until = time.monotonic() + 0.2
            while time.monotonic() < until:
                prune(root, everything=True)

        pids = [in_child(open_together) for _ in range(processes)]
        if mode == "pruned":
            pids.append(in_child(prune_meanwhile))
        os.close(release)
        assert all(os.waitpid(pid, 0)[1] == 0 for pid in pids)
        os.close(told)
        packed_in_a_round.append(os.read(report, processes).count(b"P"))
        os.close(gate)
        os.close(report)
        if mode != "pruned":
            left = sorted(path.suffix for path in (root / "packed").iterdir())
            assert left == [".json", ".safetensors"], left
            assert checkpoint.open(root).from_cache
    return {"fewest": min(packed_in_a_round), "most": max(packed_in_a_round)}


def anonymous_bytes() -> int:
    """Resident memory that is no file's."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line[:7] == "RssAnon")
    return int(line.split()[1]) * 1024


def pack(root: Path) -> dict[str, int]:
    """Pack two matrices of 32 MiB and four of 8 MiB in int8, from a bfloat16 file twice as large."""
    shapes = [(8192, 4096)] * 2 + [(2048, 4096)] * 4
    parameters, tensors = [], {}
    for number, shape in enumerate(shapes):
        name = f"layers.{number}.ffn.down.weight"
        values = np.memmap(root / f"source.{number}", np.uint16, "w+", shape=shape)
        tensors[name] = ArrayTensor(name, "bf16", shape, values)
        parameters.append(Parameter(name, shape, "matrix", name))
    checkpoint = Checkpoint(tuple(parameters), tensors)
    baseline = anonymous_bytes()
    print("ready", flush=True)
    sys.stdin.read(1)
    store = checkpoint.open(root / "cache")
    for bundle in store.values():
        for array in bundle.arrays.values():
            array.max()
    after = anonymous_bytes()
    largest = max(sum(array.nbytes for array in bundle.arrays.values()) for bundle in store.values())
    return {"baseline": baseline, "after": after, "largest": largest, "stored": store.nbytes}


if __name__ == "__main__":
    command, root, *arguments = sys.argv[1:]
    commands: dict[str, Callable[..., dict[str, int]]] = {"kill": kill, "race": race, "pack": pack}
    numbers = [int(argument) if argument.isdigit() else argument for argument in arguments]
    print(json.dumps(commands[command](Path(root), *numbers)))
