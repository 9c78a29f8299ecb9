"""Peers: transformers for real on a tiny model, llama.cpp through programs that speak as it does, and refusals."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from octavo.bench.child import Child
from octavo.bench.figures import Workload
from octavo.bench.interleaved import measure
from octavo.bench.peers import check_peer, open_peer
from octavo.bench.subject import Subject
from octavo.bench.transformers_child import _quantize_linears
from octavo.errors import IncompatibleModelError, UsageError
from octavo.loading import plan_model
from octavo.settings import Settings

LOAD = Workload(prompt_tokens=6, new_tokens=4, sequences=2)


@pytest.fixture
def planned(tiny_folder):
    return plan_model(Settings(model=str(tiny_folder), device="cpu", cache=False, threads=1))


def program(folder: Path, name: str, body: str) -> Path:
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport json, sys\nargs = sys.argv[1:]\n{body}", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_octavo_and_transformers_interleaved(tiny_folder, planned):
    subject = Subject(Settings(model=str(tiny_folder), device="cpu", cache=False, threads=1), LOAD)
    peer = open_peer("transformers=fp32", None, planned, LOAD)
    try:
        found = measure(subject, peer, 2, lambda: None)
        facts = peer.facts
    finally:
        subject.close()
        peer.close()
    for each in (*found.octavo, *found.peer):
        assert each.decode_tokens_per_second > 0
        assert each.prefill_tokens_per_second > 0
    assert facts.format == "float32"
    assert facts.load_seconds > 0
    assert facts.peak_bytes > 50 << 20
    assert subject.facts.context_tokens == 10
    assert "transformers" in facts.name


def test_the_int8_of_torch(planned, tiny_folder):
    """Its logits are near the model's own: the codes and scales are the weights'."""
    peer = open_peer("transformers=int8", None, planned, LOAD)
    try:
        assert peer.run(LOAD.prompts(128, 0)).decode_tokens_per_second > 0
        assert peer.facts.format.startswith("int8 by torch._weight_int8pack_mm")
    finally:
        peer.close()
    model = LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    ids = torch.tensor(LOAD.prompts(128, 0))
    with torch.inference_mode():
        before = model(ids).logits
        _quantize_linears(model)
        after = model(ids).logits
    assert not any(isinstance(module, torch.nn.Linear) for module in model.modules())
    assert 0 < float((after - before).float().norm() / before.float().norm()) < 0.05


def test_the_bytes_of_a_token_leave_a_table_out_that_is_not_the_head(tiny_folder):
    subject = Subject(Settings(model=str(tiny_folder), device="cpu", cache=False, quant="none"), LOAD)
    try:
        everything = sum(4 * math.prod(p.shape) for p in subject.planned.parameters)
        assert subject.facts.weight_bytes_per_token == everything - 4 * 128 * 64
    finally:
        subject.close()


def test_what_transformers_cannot_load_is_said(planned, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    broken = dataclasses.replace(planned, source=dataclasses.replace(planned.source, location=str(tmp_path)))
    with pytest.raises(IncompatibleModelError, match="transformers failed: "):
        open_peer("transformers", None, broken, LOAD)


def test_a_child_that_dies_leaves_its_last_words(monkeypatch, tmp_path):
    (tmp_path / "dies.py").write_text("raise SystemExit('no luck')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(IncompatibleModelError, match="it failed: no luck"):
        Child("dies", "it", {})


# --- llama.cpp ------------------------------------------------------------------------------------------------

BENCH = """
assert args[args.index("-m") + 1].endswith("model.gguf"), args
assert args[args.index("-t") + 1] == "1"
decodes = args[args.index("-n") + 1] != "0"
if decodes:
    assert args[args.index("-d") + 1] == "6", args
print(json.dumps([{"build_number": 7, "build_commit": "abc", "avg_ts": 40.0 if decodes else 60.0}]))
"""
BATCHED = """
assert args[args.index("-npl") + 1] == "2" and args[args.index("-c") + 1] == "20", args
print("loading\\n" + json.dumps({"speed_pp": 120.0, "speed_tg": 80.0}))
"""


@pytest.fixture
def gguf(planned, tmp_path):
    """The tiny model, said to lie in a GGUF file."""
    path = tmp_path / "model.gguf"
    path.touch()
    source = dataclasses.replace(planned.source, location=str(path), quantized_as=("q8_0",))
    return dataclasses.replace(planned, source=source)


def test_llama_bench_of_one_sequence(gguf, tmp_path):
    alone = Workload(prompt_tokens=6, new_tokens=4, sequences=1)
    path = program(tmp_path, "llama-bench", BENCH)
    peer = open_peer(f"llama.cpp={path}", None, gguf, alone)
    found = peer.run([])
    assert (found.prefill_tokens_per_second, found.decode_tokens_per_second) == (60.0, 40.0)
    assert found.first_token_seconds == pytest.approx(0.1)
    assert found.total_tokens_per_second == pytest.approx(10 / 0.2)
    assert (peer.facts.version, peer.facts.format) == ("7 (abc)", "q8_0")


def test_several_sequences_take_llama_batched_bench(gguf, tmp_path):
    path = program(tmp_path, "llama-bench", BENCH)
    with pytest.raises(UsageError, match="llama-batched-bench is not beside"):
        open_peer(f"llama.cpp={path}", None, gguf, LOAD)
    program(tmp_path, "llama-batched-bench", BATCHED)
    found = open_peer(f"llama.cpp={path}", None, gguf, LOAD).run([])
    assert (found.prefill_tokens_per_second, found.decode_tokens_per_second) == (120.0, 80.0)
    assert found.total_tokens_per_second == pytest.approx(20 / (0.1 + 0.1))


def test_a_failing_program_is_quoted(gguf, tmp_path):
    path = program(tmp_path, "llama-bench", "sys.exit('error: failed to load model')")
    alone = Workload(prompt_tokens=6, new_tokens=4, sequences=1)
    with pytest.raises(IncompatibleModelError, match="status 1: error: failed to load model"):
        open_peer(f"llama.cpp={path}", None, gguf, alone).run([])


def test_llama_cpp_wants_a_gguf_file(planned, tmp_path):
    path = program(tmp_path, "llama-bench", BENCH)
    with pytest.raises(UsageError, match="reads GGUF files") as caught:
        open_peer(f"llama.cpp={path}", None, planned, LOAD)
    assert "--peer-model" in caught.value.remedy


LLAMA_CPP = """
import time

__version__ = "0.0.1"


class Llama:
    def __init__(self, model_path, *, n_ctx, n_threads, n_threads_batch, n_gpu_layers, verbose):
        assert model_path.endswith("model.gguf") and n_gpu_layers == 0 and n_threads == 1
        self.room = n_ctx
        print("noise")

    def reset(self):
        self.used = 0

    def eval(self, tokens):
        self.used += len(tokens)
        assert self.used <= self.room
        time.sleep(0.1 if len(tokens) > 1 else 0.02)

    def sample(self, temp):
        assert temp == 0
        return 7
"""


def test_llama_cpp_python_stands_in_for_llama_bench(gguf, tmp_path, monkeypatch):
    alone = Workload(prompt_tokens=6, new_tokens=4, sequences=1)
    monkeypatch.setenv("PATH", "/nowhere")
    (tmp_path / "llama_cpp.py").write_text(LLAMA_CPP)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert check_peer("llama.cpp") == ("llama.cpp", None)
    peer = open_peer("llama.cpp", None, gguf, alone)
    try:
        found = peer.run([[1, 2, 3, 4, 5, 6]])
        assert peer.facts.version == "llama-cpp-python 0.0.1"
    finally:
        peer.close()
    assert 0.1 <= found.first_token_seconds < 1
    assert 3 < found.decode_tokens_per_second <= 50
    with pytest.raises(UsageError, match="one sequence at a time"):
        open_peer("llama.cpp", None, gguf, LOAD)


# --- what is not there ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("vllm", "there is no peer 'vllm'"),
        ("transformers=int4", "does not run as 'int4'"),
        ("llama.cpp=/nowhere/llama-bench", "there is no program /nowhere/llama-bench"),
        ("llama.cpp", "llama-bench is not on PATH"),
    ],
)
def test_unknown_and_missing_peers(said, message, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match=message):
        check_peer(said)


def test_transformers_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="transformers is not installed") as caught:
        check_peer("transformers")
    assert "pip install transformers" in caught.value.remedy


def test_detail_is_what_follows_the_name(tmp_path):
    path = program(tmp_path, "llama-bench", BENCH)
    assert check_peer(f"llama.cpp={path}") == ("llama.cpp", str(path))
    assert check_peer("transformers=fp32") == ("transformers", "fp32")
    assert check_peer("transformers=") == ("transformers", None)
