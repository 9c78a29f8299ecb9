"""The number of threads a model was given is its own: not the user's, nor another model's."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from octavo import LLM, SamplingParams
from octavo.runners.reference.model import ReferenceModel


def test_two_models_and_their_user_have_their_own_threads(tmp_path: Path, monkeypatch):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    used = []
    forward = ReferenceModel.forward

    def recorded(*args):
        used.append(torch.get_num_threads())
        return forward(*args)

    monkeypatch.setattr(ReferenceModel, "forward", recorded)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        one, two = (
            LLM(tmp_path, device="cpu", runner="reference", cache=False, context=64, threads=n)
            for n in (1, 2)
        )
        with one, two:
            for llm in (one, two, one):
                llm.generate([1], SamplingParams(max_new_tokens=1))
            assert used == [1, 2, 1]
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
