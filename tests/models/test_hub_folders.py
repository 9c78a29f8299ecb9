"""A folder as transformers writes it (real config keys, sharded weights), through the whole of `LLM`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo import LLM, SamplingParams

NEW_TOKENS = 64
_GREEDY = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)

_SETTINGS = {"quant": "none", "device": "cpu", "cache": False, "context": 256, "threads": 1}


def their_logits(theirs, ids: list[int]) -> torch.Tensor:
    """[T, V]."""
    with torch.inference_mode():
        return theirs(torch.tensor([ids]), use_cache=False).logits[0]


def logprobs_of_next(logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]


@pytest.fixture(scope="session")
def folder(tiny, tmp_path_factory):
    """A family's tiny model as `save_pretrained` writes it."""
    written: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in written:
            written[family] = tmp_path_factory.mktemp(family)
            tiny(family).theirs.save_pretrained(written[family], max_shard_size="60KB")
            assert len(list(written[family].glob("*.safetensors"))) > 1
        return written[family]

    return get


def test_reference_runner(family, tiny, folder, prompt_ids):
    """Greedy tokens through our paged cache are those transformers would choose after each of them, from scratch:
    no cache to agree with by accident."""
    theirs = tiny(family).theirs
    with LLM(folder(family), runner="reference", **_SETTINGS) as llm:
        done = llm.generate(prompt_ids, _GREEDY)
        scored = llm.score(prompt_ids)
    assert len(done.token_ids) == NEW_TOKENS
    logits = their_logits(theirs, prompt_ids + list(done.token_ids))
    assert logits[len(prompt_ids) - 1 : -1].argmax(-1).tolist() == list(done.token_ids)
    expected = logprobs_of_next(logits[: len(prompt_ids)], prompt_ids)
    torch.testing.assert_close(torch.tensor(scored.logprobs), expected, rtol=1e-4, atol=1e-4)


def test_cpu_runner(family, tiny, folder, prompt_ids):
    """The same within the rounding of the native runner's 16-bit keys and values: no token is chosen that
    transformers finds worse than the best by more than twice that."""
    theirs = tiny(family).theirs
    with LLM(folder(family), runner="cpu", **_SETTINGS) as llm:
        done = llm.generate(prompt_ids, _GREEDY)
        scored = llm.score(prompt_ids)
    logits = their_logits(theirs, prompt_ids + list(done.token_ids))
    rounding = float(0.03 * logits.std())
    choosing = logits[len(prompt_ids) - 1 : -1]
    behind = choosing.max(-1).values - choosing[range(NEW_TOKENS), list(done.token_ids)]
    assert behind.max() < 2 * rounding
    expected = logprobs_of_next(logits[: len(prompt_ids)], prompt_ids)
    torch.testing.assert_close(torch.tensor(scored.logprobs), expected, rtol=1e-3, atol=rounding)


def test_quantized_folder_stays_close(folder, prompt_ids):
    """int8 and llm-int8 end to end: not equal to full precision, and not far from it."""
    scores = {}
    for quant in ("none", "int8", "llm-int8"):
        with LLM(folder("llama"), **_SETTINGS | {"quant": quant}) as llm:
            assert llm.info()["quant"] == {"none": "f32"}.get(quant, quant)
            scores[quant] = torch.tensor(llm.score(prompt_ids).logprobs)
    for quant in ("int8", "llm-int8"):
        gap = (scores[quant] - scores["none"]).abs().mean()
        assert 0 < gap < 0.2


def test_experts_apart_or_in_a_stack(tiny, prompt_ids, tmp_path):
    """Checkpoints on the hub have a tensor an expert; transformers 5 holds all of a layer's in one."""
    theirs = tiny("mixtral").theirs
    names = set(theirs.state_dict())
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    apart, stacked = tmp_path / "apart", tmp_path / "stacked"
    theirs.save_pretrained(apart)
    theirs.save_pretrained(stacked, save_original_format=False)
    found = []
    for path in (apart, stacked):
        with LLM(path, runner="reference", **_SETTINGS) as llm:
            found.append(llm.score(prompt_ids).logprobs)
    assert found[0] == found[1]


def test_a_tensor_that_is_left_unread_is_said(tiny, tmp_path):
    tiny("llama").theirs.save_pretrained(tmp_path)
    with LLM(tmp_path, runner="reference", **_SETTINGS) as llm:
        assert not [notice for notice in llm.notices if "unread" in notice]
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.self_attn.sinks": torch.ones(4)}, path)
    with LLM(tmp_path, runner="reference", **_SETTINGS) as llm:
        assert [notice for notice in llm.notices if "self_attn.sinks" in notice and "unread" in notice]


def test_older_configs_say_the_same(tiny, prompt_ids, tmp_path):
    """rope_theta and rope_scaling as transformers 4 wrote them give the same scores as rope_parameters."""
    theirs = tiny("llama-rope-llama3").theirs
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    path.write_text(json.dumps(config))
    with LLM(tmp_path, runner="reference", **_SETTINGS) as llm:
        scored = torch.tensor(llm.score(prompt_ids).logprobs)
    expected = logprobs_of_next(their_logits(theirs, prompt_ids), prompt_ids)
    torch.testing.assert_close(scored, expected, rtol=1e-4, atol=1e-4)
