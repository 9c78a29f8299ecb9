"""`--deterministic` on a card: the same bits alone, in a batch, however a prompt is cut, and found again."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo import LLM, SamplingParams

pytestmark = pytest.mark.gpu

PROMPTS = [[(7 * i + 3 * length) % 512 for i in range(length)] for length in (3, 40, 64, 97, 180)]
DRAWN = SamplingParams(max_new_tokens=24, temperature=0.9, top_p=0.9, seed=3, ignore_eos=True, logprobs=2)
GREEDY = SamplingParams(max_new_tokens=24, temperature=0, ignore_eos=True)


@pytest.mark.parametrize("quant", ["int8", "llm-int8", "int4", "none"])
def test_tokens_and_logprobs_are_the_same_bits(folder: Path, quant: str) -> None:
    with LLM(folder, device="cuda", cache=False, max_sequences=4, deterministic=True, quant=quant) as llm:
        runner = llm.explain()["runner"]
        assert (runner["name"], runner["batch_invariant"], runner["chunk_invariant"]) == ("cuda", True, True)
        for sampling in (DRAWN, GREEDY):
            together = llm.generate(PROMPTS, sampling)
            for prompt, among in zip(PROMPTS, together, strict=True):
                alone = llm.generate(prompt, sampling)
                assert alone.token_ids == among.token_ids
                assert alone.logprobs == among.logprobs
                # What was decoded is a prompt now.
                again = llm.generate([*prompt, *among.token_ids[:10]], sampling)
                assert again.token_ids[:14] == among.token_ids[10:]
        scores = llm.score(PROMPTS[-1]).logprobs
        assert llm.score(PROMPTS[-1][:50]).logprobs == scores[:49]


def test_guesses_are_not_verified(folder: Path) -> None:
    with LLM(folder, device="cuda", cache=False, deterministic=True) as llm:
        assert llm.explain()["speculation"] == "off: the cuda runner verifies no guesses"
