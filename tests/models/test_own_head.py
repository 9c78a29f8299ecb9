"""A head beside a token table that the config says is the head: read as transformers reads it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from octavo import LLM


@pytest.fixture
def folder(tiny, tmp_path):
    """A tied Llama as `save_pretrained` writes it."""
    tiny("llama-tied-mha").theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    return tmp_path


@pytest.mark.parametrize("kind", ["absent", "copy", "another", "another last number"])
def test_a_head_of_its_own_is_used_and_a_copy_is_the_table(kind, folder, prompt_ids):
    tensors = load_file(folder / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    assert "lm_head.weight" not in tensors
    other = table.clone()
    if kind == "another":
        other = other.flip(0)
    if kind == "another last number":
        other[-1, -1] += 1
    if kind != "absent":
        save_file(
            tensors | {"lm_head.weight": other}, folder / "model.safetensors", metadata={"format": "pt"}
        )
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = theirs(torch.tensor([prompt_ids]), use_cache=False).logits[0]
    expected = logits.log_softmax(-1)[range(len(prompt_ids) - 1), prompt_ids[1:]]
    with LLM(folder, runner="reference", quant="none", device="cpu", cache=False, context=128) as llm:
        found = torch.tensor(llm.score(prompt_ids).logprobs)
        said = any("another head" in notice for notice in llm.notices)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert said == (kind not in ("absent", "copy"))
