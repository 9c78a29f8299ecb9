"""`close` gives the memory back."""

from __future__ import annotations

import gc
import re
import sys
from pathlib import Path

import pytest

from octavo import LLM, SamplingParams


def resident_bytes() -> int:
    """RssAnon: file pages, which the kernel may take back at any time, do not count."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


@pytest.mark.model
@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
@pytest.mark.parametrize("runner", ["cpu", "reference"])
def test_ten_cycles_leave_resident_memory_flat(default_model_path, runner):
    after, held = [], 0
    for _ in range(10):
        with LLM(default_model_path, device="cpu", runner=runner, context=2048) as llm:
            prompt = list(range(1000, 2000 if runner == "cpu" else 1010))
            llm.generate(prompt, SamplingParams(max_new_tokens=2))
            memory = llm.info()["memory"]
            held = resident_bytes()
        gc.collect()
        after.append(resident_bytes())
    # The native runner's weights are pages of the mapped cache; its KV cache, and all of the reference's, are not.
    freed = memory["weights"] if runner == "reference" else memory["kv"] // 2
    assert held - after[-1] > 0.95 * freed
    # Growth of the first cycles ends by itself (docs/log.md, "Memory given back").
    assert after[-1] - after[0] < 32 << 20, [value >> 20 for value in after]
