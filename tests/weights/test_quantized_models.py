"""Whole checkpoints that transformers and bitsandbytes wrote: loaded, they compute with their own numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from octavo import LLM

bitsandbytes = pytest.importorskip("bitsandbytes")

IDS = [3, 17, 99, 4, 4, 60, 21, 8, 120, 1]


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=None,
        bos_token_id=None,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("plain")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def logprobs(folder: Path, quant: str, runner: str = "reference") -> tuple[np.ndarray, str]:
    with LLM(folder, quant=quant, device="cpu", runner=runner, cache=False, context=64) as llm:
        return np.array(llm.score(IDS).logprobs), llm.info()["quant"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["llm-int8", "nf4", "nested fp4"])
def test_a_bitsandbytes_checkpoint_computes_with_its_own_weights(
    plain_folder: Path, tmp_path: Path, kind: str
):
    config = {
        "llm-int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "nested fp4": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True
        ),
    }[kind]
    model = AutoModelForCausalLM.from_pretrained(
        plain_folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "quantized")
    # The library's own dequantizer makes the truth: a full-precision folder of the same weights.
    truth = LlamaForCausalLM.from_pretrained(plain_folder, dtype=torch.float32)
    dequantized = 0
    for name, module in model.named_modules():
        if isinstance(module, (bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit)):
            state = module.state if kind == "llm-int8" else None
            truth.get_submodule(name).weight.data = dequantize_bnb_weight(module.weight, state).float()
            dequantized += 1
    assert dequantized == 14
    truth.save_pretrained(tmp_path / "dequantized")
    found, quant = logprobs(tmp_path / "quantized", "auto")
    expected, _ = logprobs(tmp_path / "dequantized", "none")
    original, _ = logprobs(plain_folder, "none")
    assert {"llm-int8": "llm-int8", "nf4": "nf4", "nested fp4": "fp4-g64"}[kind] in quant
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        logprobs(tmp_path / "quantized", "auto", "cpu")[0], expected, rtol=0, atol=5e-3
    )
    assert np.abs(expected - original).max() > 1e-3
