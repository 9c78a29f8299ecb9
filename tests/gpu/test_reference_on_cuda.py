"""The reference runner on a CUDA device: same model, same tokens as on the CPU, memory back after close."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from octavo import LLM, SamplingParams

pytestmark = pytest.mark.gpu


PROMPT = [(7 * i) % 512 for i in range(200)]


def run(folder: Path, device: str, dtype: str, quant: str = "int8") -> tuple[list[int], list[float]]:
    with LLM(folder, quant=quant, device=device, dtype=dtype, runner="reference", cache=False) as llm:
        assert llm.info()["device"].startswith(device)
        done = llm.generate(PROMPT, SamplingParams(max_new_tokens=64, temperature=0, ignore_eos=True))
        return list(done.token_ids), list(llm.score(PROMPT).logprobs)


@pytest.mark.parametrize("quant", ["none", "int8", "llm-int8"])
def test_float32_gives_the_tokens_of_the_cpu(folder, quant):
    cpu_tokens, cpu_scores = run(folder, "cpu", "float32", quant)
    gpu_tokens, gpu_scores = run(folder, "cuda", "float32", quant)
    assert gpu_tokens == cpu_tokens
    assert gpu_scores == pytest.approx(cpu_scores, abs=2e-3)


def test_auto_takes_bfloat16_and_stays_close(folder):
    _, cpu_scores = run(folder, "cpu", "float32")
    _, gpu_scores = run(folder, "cuda", "auto")
    gaps = torch.tensor(gpu_scores) - torch.tensor(cpu_scores)
    assert 0 < gaps.abs().mean() < 0.1


def test_sampling_on_the_device_follows_the_law(folder):
    """Noise is a function of seed and position alone: same seed, same tokens, on either device."""
    params = SamplingParams(max_new_tokens=48, temperature=0.8, top_p=0.9, top_k=50, seed=9, ignore_eos=True)
    tokens = []
    for device in ("cpu", "cuda"):
        with LLM(folder, device=device, dtype="float32", runner="reference", cache=False) as llm:
            tokens.append(llm.generate(PROMPT, params).token_ids)
    assert tokens[0] == tokens[1]


def test_close_gives_device_memory_back(folder):
    torch.zeros(1, device="cuda")
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        run(folder, "cuda", "auto")
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() - before < 1 << 20
