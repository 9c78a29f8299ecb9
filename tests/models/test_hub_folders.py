"""A folder as transformers writes it (real config keys, sharded weights), through the whole of `LLM`."""

from __future__ import annotations

import json

import torch

from octavo import LLM, SamplingParams

NEW_TOKENS = 64


def greedy(theirs, prompt: list[int]) -> list[int]:
    """transformers' own greedy continuation, every step from scratch: no cache to agree with by accident."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            ids.append(int(theirs(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_tokens_through_our_paged_cache(case, tiny, prompt_ids, tmp_path):
    theirs = tiny(case).theirs
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    params = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    with LLM(tmp_path, quant="none", device="cpu", runner="reference", cache=False, context=256) as llm:
        done = llm.generate(prompt_ids, params)
        scored = llm.score(prompt_ids)
    assert list(done.token_ids) == greedy(theirs, prompt_ids)
    logprobs = tiny(case).their_logits(prompt_ids).log_softmax(-1)
    expected = logprobs[range(len(prompt_ids) - 1), prompt_ids[1:]]
    torch.testing.assert_close(torch.tensor(scored.logprobs), expected, rtol=1e-4, atol=1e-4)


def test_quantized_folder_stays_close(tiny, prompt_ids, tmp_path):
    """int8 and llm-int8 end to end: not equal to full precision, and not far from it."""
    tiny("llama").theirs.save_pretrained(tmp_path)
    scores = {}
    for quant in ("none", "int8", "llm-int8"):
        with LLM(tmp_path, quant=quant, device="cpu", cache=False, context=128) as llm:
            assert llm.info()["quant"] == {"none": "f32"}.get(quant, quant)
            scores[quant] = torch.tensor(llm.score(prompt_ids).logprobs)
    for quant in ("int8", "llm-int8"):
        gap = (scores[quant] - scores["none"]).abs().mean()
        assert 0 < gap < 0.2


def test_older_configs_say_the_same(tiny, prompt_ids, tmp_path):
    """rope_theta and rope_scaling as transformers 4 wrote them give the same tokens as rope_parameters."""
    theirs = tiny("llama-rope-llama3").theirs
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    path.write_text(json.dumps(config))
    params = SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True)
    with LLM(tmp_path, quant="none", device="cpu", runner="reference", cache=False, context=128) as llm:
        assert list(llm.generate(prompt_ids, params).token_ids) == greedy(theirs, prompt_ids)[:8]
