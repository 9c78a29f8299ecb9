"""Threads give way to another process instead of spinning for a core they do not get."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "cpu" / "busy_neighbor.py"


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="CPU affinity is Linux's")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two CPUs")
def test_two_threads_beside_a_busy_process_are_nearly_as_fast_as_one_alone(default_model_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("busy_neighbor", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, benchmark)
    spec.loader.exec_module(benchmark)
    found = benchmark.measure(str(default_model_path), "auto", rounds=5)
    # Wanted: 0.75 (docs/performance.md). Spinning gives a tenth; what else the machine does costs some.
    assert max(each.kept for each in found) >= 0.6
