"""Which runner computes: the fastest that can, or the one that was asked for, or a refusal that says why."""

from __future__ import annotations

import pytest

from octavo import LLM, SamplingParams, errors
from octavo.runners.cpu.library import ISA_NAMES, supported_isas

GREEDY = SamplingParams(max_new_tokens=12, temperature=0)
PROMPT = [5, 17, 99, 3, 42]


@pytest.mark.parametrize(("asked", "taken"), [("auto", "cpu"), ("cpu", "cpu"), ("reference", "reference")])
def test_a_runner_can_be_asked_for(tiny_folder, asked, taken):
    with LLM(tiny_folder, device="cpu", runner=asked, cache=False, context=64) as llm:
        assert llm.info()["runner"] == taken


def test_bfloat16_goes_to_the_reference_and_the_plan_says_why(tiny_folder):
    with LLM(tiny_folder, device="cpu", dtype="bfloat16", cache=False, context=64) as llm:
        assert llm.info()["runner"] == "reference"
        assert any("cpu declined" in reason for reason in llm._planned.plan.reasons)


def test_every_instruction_set_gives_the_reference_runners_tokens(tiny_folder):
    with LLM(tiny_folder, device="cpu", runner="reference", cache=False, context=64) as llm:
        expected = llm.generate(PROMPT, GREEDY).token_ids
    for isa in supported_isas():
        with LLM(tiny_folder, device="cpu", isa=isa, cache=False, context=64) as llm:
            assert llm.generate(PROMPT, GREEDY).token_ids == expected


def test_an_instruction_set_this_machine_lacks_is_refused(tiny_folder):
    for isa in set(ISA_NAMES) - set(supported_isas()):
        with pytest.raises(errors.IncompatibleModelError, match=f"no {isa}"):
            LLM(tiny_folder, device="cpu", isa=isa, cache=False, context=64)


def test_an_instruction_set_for_the_reference_is_a_contradiction(tiny_folder):
    with pytest.raises(errors.InvalidParameterError) as caught:
        LLM(tiny_folder, device="cpu", isa="portable", runner="reference")
    assert caught.value.parameter == "isa"


def test_deterministic_is_what_the_cpu_runner_is_and_the_reference_is_not(tiny_folder):
    with LLM(tiny_folder, device="cpu", deterministic=True, cache=False, context=64) as llm:
        runner = llm.explain()["runner"]
        assert (runner["name"], runner["batch_invariant"], runner["chunk_invariant"]) == ("cpu", True, True)
    with pytest.raises(errors.IncompatibleModelError, match="how a prompt is cut") as caught:
        LLM(tiny_folder, device="cpu", deterministic=True, runner="reference", cache=False, context=64)
    assert "--deterministic" in str(caught.value.remedy)


def test_int8_activations_for_the_reference_are_a_contradiction(tiny_folder):
    with pytest.raises(errors.InvalidParameterError) as caught:
        LLM(tiny_folder, device="cpu", activations="int8", runner="reference")
    assert caught.value.parameter == "activations"
