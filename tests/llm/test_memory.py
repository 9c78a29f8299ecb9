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
def test_ten_cycles_leave_resident_memory_flat(default_model_path):
    after = []
    for _ in range(10):
        with LLM(default_model_path, device="cpu", runner="reference", context=256) as llm:
            llm.generate("Hello", SamplingParams(max_new_tokens=2))
            held = resident_bytes()
        gc.collect()
        after.append(resident_bytes())
    weights = 4 * 134_515_008
    assert held - after[-1] > 0.95 * weights
    # A new thread may start a malloc arena of its own, up to eight a core: a few MB that do not go on growing.
    assert after[-1] - after[0] < 0.05 * weights, [value >> 20 for value in after]
