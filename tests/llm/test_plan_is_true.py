"""What the plan says before a load, against what a fresh process really takes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

_CHILD = """
import json, re, sys, threading
from octavo import LLM, SamplingParams

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10

peak, loaded = 0, threading.Event()

def watch():
    global peak
    while not loaded.wait(0.002):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
packed_in_memory = sys.argv[2] == "reference"
with LLM(
    sys.argv[1], quant="int8", runner=sys.argv[2], device="cpu", context=1024, threads=1,
    cache=not packed_in_memory,
) as llm:
    loaded.set()
    watcher.join()
    pool = llm._planned.plan.pools[0]
    llm.generate([1000 + i for i in range(1000)], SamplingParams(max_new_tokens=16, ignore_eos=True))
    print(json.dumps({
        "parts": dict(pool.parts), "load_peak": pool.load_peak_bytes, "measured_peak": peak,
        "anonymous": anonymous(), "torch": "torch" in sys.modules,
    }))
"""


@pytest.mark.model
@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
@pytest.mark.parametrize("runner", ["cpu", "reference"])
def test_planned_bytes_cover_what_a_load_takes_and_little_more(default_model_path, runner):
    ran = subprocess.run(
        [sys.executable, "-c", _CHILD, str(default_model_path), runner],
        check=True,
        capture_output=True,
        text=True,
    )
    found = json.loads(ran.stdout)
    planned = sum(count for part, count in found["parts"].items() if part != "mapped weights")
    assert 0.6 * planned < found["anonymous"] <= 1.05 * planned
    # Packed in memory: packed model, one full tensor and the runner's own copy at once, and no more.
    assert found["measured_peak"] <= found["load_peak"]
    assert found["torch"] == (runner == "reference")
