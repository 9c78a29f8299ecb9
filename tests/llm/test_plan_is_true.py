"""What the plan says before a load, against what a fresh process really takes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

_CHILD = """
import json, re, sys
from octavo import LLM, SamplingParams
with LLM(sys.argv[1], quant=sys.argv[2], runner=sys.argv[3], device="cpu", context=1024, threads=1) as llm:
    pool = llm._planned.plan.pools[0]
    llm.generate([1000 + i for i in range(1000)], SamplingParams(max_new_tokens=16, ignore_eos=True))
    anonymous = int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10
    print(json.dumps({"parts": dict(pool.parts), "anonymous": anonymous, "torch": "torch" in sys.modules}))
"""


@pytest.mark.model
@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
@pytest.mark.parametrize("runner", ["cpu", "reference"])
def test_planned_bytes_cover_what_a_load_takes_and_little_more(default_model_path, runner):
    ran = subprocess.run(
        [sys.executable, "-c", _CHILD, str(default_model_path), "int8", runner],
        check=True,
        capture_output=True,
        text=True,
    )
    found = json.loads(ran.stdout)
    planned = sum(count for part, count in found["parts"].items() if part != "mapped weights")
    assert 0.6 * planned < found["anonymous"] <= 1.05 * planned
    assert found["torch"] == (runner == "reference")
