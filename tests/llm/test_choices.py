"""n, prompt logprobs, logits processors and speculation through `LLM`, on a tiny random model and token ids."""

from __future__ import annotations

import numpy as np
import pytest

from octavo import LLM, SamplingParams, errors

PROMPT = [5, 17, 99, 3, 42]


def params(**said):
    return SamplingParams(max_new_tokens=12, **said)


def test_choices_share_the_seed_and_are_what_each_is_alone(llm):
    done = llm.generate(PROMPT, params(n=4, seed=9))
    assert done.choices[0] is done
    assert [each.choice for each in done.choices] == [0, 1, 2, 3]
    assert {each.seed for each in done.choices} == {9}
    assert len({each.token_ids for each in done.choices}) == 4
    assert done.token_ids == llm.generate(PROMPT, params(seed=9)).token_ids
    again = llm.generate(PROMPT, params(n=2, seed=9))
    assert [each.token_ids for each in again.choices] == [each.token_ids for each in done.choices[:2]]


def test_one_choice_has_no_others(llm):
    done = llm.generate(PROMPT, params())
    assert (done.others, done.choices, done.choice) == ((), (done,), 0)


def test_many_prompts_have_their_own_choices(llm):
    done = llm.generate([[1, 2], [3, 4]], params(n=2, seed=1))
    for prompt, each in zip([[1, 2], [3, 4]], done, strict=True):
        alone = llm.generate(prompt, params(n=2, seed=1))
        assert [choice.token_ids for choice in each.choices] == [choice.token_ids for choice in alone.choices]


def test_a_stream_mixes_choices_and_says_whose_each_piece_is(llm):
    found: dict[int, list[int]] = {}
    ends = {}
    for event in llm.stream(PROMPT, params(n=3, seed=2)):
        found.setdefault(event.choice, []).extend(event.token_ids)
        if event.completion is not None:
            ends[event.choice] = event.completion
    done = llm.generate(PROMPT, params(n=3, seed=2))
    assert [tuple(found[choice]) for choice in range(3)] == [each.token_ids for each in done.choices]
    assert [ends[choice].token_ids for choice in range(3)] == [each.token_ids for each in done.choices]


def test_greedy_choices_are_all_the_same(llm):
    done = llm.generate(PROMPT, params(n=3, temperature=0))
    assert len({each.token_ids for each in done.choices}) == 1


def test_prompt_logprobs_are_the_scores_of_the_prompt(llm):
    done = llm.generate(PROMPT, params(prompt_logprobs=2, n=2, seed=0))
    scored = llm.score(PROMPT)
    assert [each.token_id for each in done.prompt_logprobs] == PROMPT[1:]
    assert [each.logprob for each in done.prompt_logprobs] == pytest.approx(scored.logprobs, abs=1e-4)
    assert all(len(each.top) == 2 for each in done.prompt_logprobs)
    assert done.others[0].prompt_logprobs is None
    assert llm.generate(PROMPT, params()).prompt_logprobs is None


def test_a_processor_sees_every_token_and_decides(llm):
    seen = []

    def only_seven(token_ids, logits):
        seen.append((tuple(token_ids), logits.shape, logits.dtype))
        return np.where(np.arange(len(logits)) == 7, logits, -np.inf)

    done = llm.generate(PROMPT, params(logits_processors=(only_seven,)))
    assert done.token_ids == (7,) * 12
    assert [ids for ids, _, _ in seen] == [(*PROMPT, *[7] * step) for step in range(12)]
    assert {(shape, dtype) for _, shape, dtype in seen} == {((128,), np.dtype(np.float32))}


def test_processors_run_in_order_before_the_law(llm):
    def double(_, logits):
        return logits * 2

    def plus_bias(_, logits):
        raised = logits.copy()
        raised[9] += 1000
        return raised

    done = llm.generate(PROMPT, params(temperature=0, logits_processors=(double, plus_bias)))
    assert set(done.token_ids) == {9}
    doubled = llm.generate(PROMPT, params(temperature=2.0, seed=3, logits_processors=(double,)))
    assert doubled.token_ids == llm.generate(PROMPT, params(temperature=1.0, seed=3)).token_ids


@pytest.mark.parametrize(
    "broken", [lambda ids, logits: 1 / 0, lambda ids, logits: logits[:5], lambda ids, logits: logits * np.nan]
)
def test_a_processor_that_fails_fails_its_request_alone(llm, broken):
    stream = llm.stream([1, 2, 3], params(seed=1))
    with pytest.raises((ZeroDivisionError, errors.OctavoError)):
        llm.generate(PROMPT, params(logits_processors=(broken,)))
    assert list(stream)[-1].completion.token_ids == llm.generate([1, 2, 3], params(seed=1)).token_ids


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        ({"n": 0}, errors.InvalidParameterError, "n is 0"),
        ({"n": 129}, errors.InvalidParameterError, "128"),
        ({"prompt_logprobs": 21}, errors.InvalidParameterError, "prompt_logprobs"),
        ({"logits_processors": (3,)}, errors.InvalidParameterError, "logits_processors"),
        ({"logits_processors": "f"}, errors.InvalidParameterError, "logits_processors"),
        ({"regex": "a"}, errors.IncompatibleModelError, "no tokenizer"),
        ({"regex": "a", "lark": "b"}, errors.InvalidParameterError, "regex and lark"),
        (
            {"json_object": True, "ignore_eos": True},
            errors.InvalidParameterError,
            "json_object and ignore_eos",
        ),
    ],
)
def test_what_is_refused_is_named(llm, said, error, words):
    with pytest.raises(error, match=words) as caught:
        llm.generate(PROMPT, params(**said))
    assert caught.value.remedy


def test_beam_search_is_no_parameter():
    with pytest.raises(TypeError, match="num_beams"):
        SamplingParams(num_beams=4)  # type: ignore[call-arg]


# --- speculation ---------------------------------------------------------------------------------------------

REPEATING = [3, 1, 4, 1, 5, 9, 2, 6] * 6


@pytest.fixture(scope="module")
def both(tiny_folder):
    fixed = {"device": "cpu", "runner": "cpu", "cache": False, "context": 512, "max_sequences": 4}
    with LLM(tiny_folder, speculation="off", **fixed) as plain, LLM(tiny_folder, **fixed) as guessing:
        yield plain, guessing


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"seed": 5}, {"seed": 6, "repetition_penalty": 1.2}]
)
def test_guesses_never_change_tokens_or_logprobs(both, sampling):
    plain, guessing = both
    said = SamplingParams(max_new_tokens=200, logprobs=2, **sampling)
    prompts = [REPEATING, PROMPT, REPEATING[3:] + PROMPT]
    for want, found in zip(plain.generate(prompts, said), guessing.generate(prompts, said), strict=True):
        assert (found.token_ids, found.logprobs) == (want.token_ids, want.logprobs)
    assert plain.info()["engine"]["drafts_proposed"] == 0


def test_guesses_that_come_true_save_steps(both):
    plain, guessing = both
    before = [each.info()["engine"] for each in both]
    said = SamplingParams(max_new_tokens=300, temperature=0)
    assert plain.generate(REPEATING, said).token_ids == guessing.generate(REPEATING, said).token_ids
    steps = [each.info()["engine"]["steps"] - was["steps"] for each, was in zip(both, before, strict=True)]
    accepted = guessing.info()["engine"]["drafts_accepted"] - before[1]["drafts_accepted"]
    assert accepted > 0
    assert steps[1] < steps[0]


def test_speculation_where_it_is_not_exact_is_refused_by_both_names(tiny_folder):
    fixed = {"device": "cpu", "runner": "reference", "cache": False, "context": 64}
    with pytest.raises(errors.InvalidParameterError, match=r"prompt-lookup and runner reference"):
        LLM(tiny_folder, speculation="prompt-lookup", **fixed)
    with LLM(tiny_folder, **fixed) as llm:
        assert "off: the reference runner" in llm.explain()["speculation"]


# --- states and explain --------------------------------------------------------------------------------------


def test_states_occur_in_their_order(tiny_folder):
    seen: list[str] = []

    class Watched(LLM):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "_state":
                seen.append(self.info()["state"])

    with Watched(tiny_folder, device="cpu", cache=False, context=64) as llm:
        assert llm.state == "ready"
    assert seen == ["initializing", "loading", "warming", "ready", "draining", "closed"]
    assert llm.info()["state"] == "closed"


def test_explain_names_runner_kernels_layers_and_counts(llm):
    before = llm.explain()["counters"]["generated_tokens"]
    llm.generate(PROMPT, params())
    facts = llm.explain()
    assert facts["counters"]["generated_tokens"] - before == 12
    assert facts["runner"]["name"] == llm.info()["runner"]
    assert facts["runner"]["kernels"]
    assert [each["layers"] for each in facts["layers"]] == ["embedding", "layers 0 to 1", "head"]
    assert {each["device"] for each in facts["layers"]} == {"cpu"}
    assert facts["layers"][1]["formats"] == ["int8"]
    assert any("sequences" in reason for reason in facts["reasons"])


def test_explain_says_what_was_declined(tiny_folder):
    with LLM(tiny_folder, device="cpu", dtype="bfloat16", cache=False, context=64) as llm:
        facts = llm.explain()
    assert [each["runner"] for each in facts["declined"]] == ["cuda", "cpu"]
    assert "bfloat16" in facts["declined"][1]["reason"]


def test_explain_after_close_is_a_typed_error(tiny_folder):
    llm = LLM(tiny_folder, device="cpu", cache=False, context=64)
    llm.close()
    with pytest.raises(errors.ClosedError):
        llm.explain()
