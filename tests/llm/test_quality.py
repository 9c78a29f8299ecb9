"""What quantizing the default model costs, through the benchmark that docs/log.md quotes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "quality.py"


@pytest.mark.model
def test_kl_divergence_stays_under_its_bounds(default_model_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("quality", BENCHMARK)
    quality = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "quality", quality)  # dataclasses look their module up
    spec.loader.exec_module(quality)
    formats = ("auto", "int8", "llm-int8")
    measured = quality.measure(str(default_model_path), 512, formats)
    found = {name: one.divergence for name, one in measured.items()}
    assert found["auto"].kl_nats == 0
    assert found["auto"].top1_agreement == 1
    assert 0 < found["int8"].kl_nats <= 0.003
    assert found["int8"].kl_nats < found["llm-int8"].kl_nats <= 0.006
