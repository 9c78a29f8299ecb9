"""What the plan says before a load, against what a fresh process really takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RssAnon and RssFile are Linux's")

_CHILD = """
import json, re, sys, threading
from octavo import LLM, SamplingParams

def held(*keys):
    status = open("/proc/self/status").read()
    return sum(int(re.search(rf"{key}:\\s+(\\d+) kB", status)[1]) << 10 for key in keys)

anonymous_while_loading = shared = 0
loaded, ended = threading.Event(), threading.Event()

def watch():
    global anonymous_while_loading, shared
    while not ended.wait(0.002):
        if loaded.is_set():
            shared = max(shared, held("RssFile", "RssShmem"))
        else:
            anonymous_while_loading = max(anonymous_while_loading, held("RssAnon"))

watcher = threading.Thread(target=watch)
watcher.start()
settings = json.loads(sys.argv[1])
with LLM(device="cpu", threads=1, **settings) as llm:
    loaded.set()
    pool = llm._planned.plan.pools[0]
    tokens, vocabulary = settings["context"], llm._planned.spec.vocab_size
    # All of the context, so that every page of keys and values is written; then all else that takes memory once.
    prompt = [20 + i % (vocabulary - 20) for i in range(tokens - 16)]
    llm.generate(prompt, SamplingParams(max_new_tokens=16, ignore_eos=True))
    llm.generate(prompt[:8], SamplingParams(max_new_tokens=4, regex="[a-z]+"))
    # What copies itself is guessed, as many tokens as may be in a step.
    copied = (prompt[:8] * 20)[: max(8, tokens - 64)]
    llm.generate(copied, SamplingParams(max_new_tokens=48, ignore_eos=True, temperature=0.0))
    anonymous = held("RssAnon")
    ended.set()
    watcher.join()
    print(json.dumps({
        "parts": dict(pool.parts), "running": pool.running_bytes, "load_peak": pool.load_peak_bytes,
        "anonymous": anonymous, "anonymous_while_loading": anonymous_while_loading, "shared": shared,
        "torch": "torch" in sys.modules,
    }))
"""

Measure = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def measure(tmp_path_factory: pytest.TempPathFactory) -> Measure:
    """Loads a model in a fresh process, fills its context, and returns what was planned and what was taken."""
    cache = tmp_path_factory.mktemp("cache")

    def measured(**settings: Any) -> dict[str, Any]:
        ran = subprocess.run(
            [sys.executable, "-c", _CHILD, json.dumps(settings)],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {"OCTAVO_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        )
        found: dict[str, Any] = json.loads(ran.stdout)
        return found

    return measured


@pytest.fixture(scope="module")
def medium_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of 46 million parameters, and a tokenizer of bytes."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=640,
        intermediate_size=1792,
        num_hidden_layers=8,
        num_attention_heads=10,
        num_key_value_heads=10,
        max_position_embeddings=4096,
        eos_token_id=0,
        bos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("medium")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pipeline = Tokenizer(models.BPE(vocab={byte: token for token, byte in enumerate(alphabet)}, merges=[]))
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    pipeline.save(str(folder / "tokenizer.json"))
    return folder


def check(measure: Measure, model: Path, quant: str, context: int) -> None:
    """Within 10 %. Packed once first: while it packs, a process also maps the checkpoint."""
    settings = {"model": str(model), "quant": quant, "runner": "cpu"}
    measure(**settings, context=64)
    found = measure(**settings, context=context)
    assert not found["torch"]
    assert found["anonymous"] + found["shared"] == pytest.approx(found["running"], rel=0.1), found


CONTEXTS = [256, pytest.param(1024, marks=pytest.mark.slow), pytest.param(2048, marks=pytest.mark.slow)]


@pytest.mark.model
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("quant", ["auto", "int8"])
def test_the_default_model_takes_what_its_plan_says(measure, default_model_path, quant, context):
    check(measure, default_model_path, quant, context)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("quant", ["none", "int8"])
def test_a_random_model_takes_what_its_plan_says(measure, medium_folder, quant, context):
    check(measure, medium_folder, quant, context)


@pytest.mark.model
@pytest.mark.parametrize("runner", ["cpu", "reference"])
def test_a_load_never_takes_more_than_its_planned_peak(measure, default_model_path, runner):
    """Packed in memory: packed model, one full tensor and the runner's own copy at once, and no more."""
    settings = {"quant": "int8", "runner": runner, "context": 1024, "cache": runner == "cpu"}
    found = measure(model=str(default_model_path), **settings)
    # Mapped weights may have become anonymous: copied into huge pages, and their file's pages given back.
    planned = sum(found["parts"].values())
    assert 0.6 * planned < found["anonymous"] + found["shared"] <= 1.05 * planned
    assert found["anonymous_while_loading"] <= found["load_peak"]
    assert found["torch"] == (runner == "reference")
