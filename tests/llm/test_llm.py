"""`LLM` on a tiny random model and token ids: results, streams, faults, threads, closing."""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from octavo import LLM, SamplingParams, errors
from octavo.types import FinishReason

GREEDY = SamplingParams(max_new_tokens=24, temperature=0)
PROMPT = [5, 17, 99, 3, 42]


def test_a_completion_carries_its_facts(llm):
    done = llm.generate(PROMPT, SamplingParams(max_new_tokens=6, seed=11, logprobs=3))
    assert done.finish_reason is FinishReason.LENGTH
    assert done.prompt_token_ids == tuple(PROMPT)
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (5, 6)
    assert done.seed == 11
    assert done.text == ""  # no tokenizer
    assert len(done.logprobs) == 6
    for entry, token in zip(done.logprobs, done.token_ids, strict=True):
        assert entry.token_id == token
        values = [value for _, value in entry.top]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
    assert done.timings.first_token_seconds <= done.timings.total_seconds


def test_the_same_seed_gives_the_same_tokens_and_another_does_not(llm):
    def run(seed):
        return llm.generate(PROMPT, SamplingParams(max_new_tokens=24, seed=seed)).token_ids

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_a_drawn_seed_is_returned_and_repeats_the_answer(llm):
    done = llm.generate(PROMPT, SamplingParams(max_new_tokens=24))
    again = llm.generate(PROMPT, SamplingParams(max_new_tokens=24, seed=done.seed))
    assert again.token_ids == done.token_ids


def test_several_prompts_give_what_each_gives_alone(llm):
    prompts = [[i, 2 * i % 128, 7] for i in range(1, 10)]
    together = llm.generate(prompts, SamplingParams(max_new_tokens=24, seed=4))
    alone = [llm.generate(prompt, SamplingParams(max_new_tokens=24, seed=4)) for prompt in prompts]
    assert [done.token_ids for done in together] == [done.token_ids for done in alone]
    assert [done.prompt_token_ids for done in together] == [tuple(prompt) for prompt in prompts]


def test_a_stream_is_the_completion_in_pieces(llm):
    events = list(llm.stream(PROMPT, GREEDY))
    done = events[-1].completion
    assert done.token_ids == llm.generate(PROMPT, GREEDY).token_ids
    assert sum((event.token_ids for event in events), ()) == done.token_ids
    assert all(event.completion is None for event in events[:-1])


def test_stop_token_ids_end_a_generation(llm):
    free = llm.generate(PROMPT, GREEDY).token_ids
    stop = free[5]
    done = llm.generate(PROMPT, SamplingParams(max_new_tokens=24, temperature=0, stop_token_ids=(stop,)))
    assert done.finish_reason is FinishReason.STOP
    assert done.token_ids == free[: free.index(stop) + 1]


@pytest.mark.parametrize("how", ["close", "drop", "drop unread"])
def test_an_abandoned_stream_is_cancelled(llm, how):
    stream = llm.stream(PROMPT, SamplingParams(max_new_tokens=250 - len(PROMPT), temperature=0))
    if how != "drop unread":
        next(stream)
    if how == "close":
        stream.close()
    del stream
    deadline = time.monotonic() + 5
    while (engine := llm.info()["engine"])["running"] or engine["waiting"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_score_agrees_with_the_logprobs_of_generation(llm):
    done = llm.generate(PROMPT, SamplingParams(max_new_tokens=12, temperature=0, logprobs=0))
    scored = llm.score([*PROMPT, *done.token_ids])
    assert scored.logprobs[len(PROMPT) - 1 :] == pytest.approx(
        [entry.logprob for entry in done.logprobs], abs=1e-4
    )
    assert scored.perplexity > 1


def test_threads_get_their_own_answers(llm):
    expected = {
        seed: llm.generate([seed, 1], SamplingParams(max_new_tokens=16, seed=seed)) for seed in range(8)
    }
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(
            lambda seed: llm.generate([seed, 1], SamplingParams(max_new_tokens=16, seed=seed)), range(8)
        )
        for seed, done in enumerate(found):
            assert done.token_ids == expected[seed].token_ids


@pytest.mark.parametrize(
    ("prompt", "params", "error"),
    [
        ([], None, errors.EmptyPromptError),
        ([1, 128], None, errors.InvalidInputError),
        ([1, -1], None, errors.InvalidInputError),
        ([1, 2.5], None, errors.InvalidInputError),
        (list(range(100)) * 3, None, errors.ContextLengthError),
        ([1] * 250, SamplingParams(max_new_tokens=7), errors.ContextLengthError),
        ([1], SamplingParams(temperature=-1), errors.InvalidParameterError),
        ([1], SamplingParams(top_p=0), errors.InvalidParameterError),
        ([1], SamplingParams(logit_bias={128: 1.0}), errors.InvalidParameterError),
        ("text", None, errors.IncompatibleModelError),
    ],
)
def test_bad_input_is_refused_and_nothing_is_lost(llm, prompt, params, error):
    with pytest.raises(error) as caught:
        llm.generate(prompt, params)
    assert caught.value.message
    assert caught.value.remedy
    assert llm.generate(PROMPT, GREEDY).token_ids


def test_a_context_error_says_both_numbers(llm):
    with pytest.raises(errors.ContextLengthError, match=r"300\D+256") as caught:
        llm.generate([1] * 300)
    assert (caught.value.prompt_tokens, caught.value.context_tokens) == (300, 256)


def test_the_context_is_usable_to_its_last_token(llm):
    done = llm.generate([1] * 200, SamplingParams(max_new_tokens=56, temperature=0))
    assert len(done.token_ids) == 56


def test_no_template_is_refused_with_the_fix(llm):
    with pytest.raises(errors.ChatTemplateError) as caught:
        llm.chat([{"role": "user", "content": "Hi"}])
    assert "--raw" in caught.value.remedy


def test_timings_are_the_engines_whatever_the_reader_does(llm):
    stream = llm.stream(PROMPT, GREEDY)
    time.sleep(0.5)  # late, then slow
    done = [(event, time.sleep(0.02)) for event in stream][-1][0].completion
    assert done.timings.total_seconds < 0.4
    assert done.timings.decode_tokens_per_second > 60


def test_who_waits_for_a_slot_is_timed_apart(tiny_folder):
    with LLM(tiny_folder, device="cpu", cache=False, context=256, max_sequences=1) as llm:
        first, second = llm.generate([PROMPT] * 2, SamplingParams(max_new_tokens=100, temperature=0))
    assert first.timings.queued_seconds < second.timings.queued_seconds
    assert second.timings.queued_seconds == pytest.approx(first.timings.total_seconds, rel=0.2)
    assert second.timings.first_token_seconds > second.timings.queued_seconds


def test_a_model_that_is_dropped_unclosed_ends_its_thread(tiny_folder):
    llm = LLM(tiny_folder, device="cpu", cache=False, context=64)
    thread = llm._driver._thread
    llm.generate([1], SamplingParams(max_new_tokens=1))
    del llm
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_checkpoints_files_are_let_go_once_loaded(tiny_folder):
    with LLM(tiny_folder, device="cpu", cache=False, context=64):
        assert str(tiny_folder) not in Path("/proc/self/maps").read_text()


def test_a_program_that_ends_in_the_middle_of_an_answer_ends_well(tiny_folder):
    program = f"""
from octavo import LLM, SamplingParams
llm = LLM({str(tiny_folder)!r}, device="cpu", cache=False, context=512, runner="reference")
stream = llm.stream([1], SamplingParams(max_new_tokens=500, temperature=0))
next(stream)
"""
    run = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_use_after_close_is_a_typed_error(tiny_folder):
    llm = LLM(tiny_folder, device="cpu", cache=False, context=64)
    llm.close()
    llm.close()
    assert llm.info()["state"] == "closed"
    with pytest.raises(errors.ClosedError):
        llm.generate([1])


def test_close_ends_what_is_running(tiny_folder):
    llm = LLM(tiny_folder, device="cpu", cache=False, context=512)
    stream = llm.stream([1], SamplingParams(max_new_tokens=500, temperature=0))
    next(stream)
    closer = threading.Thread(target=llm.close)
    closer.start()
    with pytest.raises(errors.ClosedError):
        for _ in stream:
            pass
    closer.join()


def test_a_pickle_is_refused_by_name(tiny_folder, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(errors.UnsafeFileError, match=r"pytorch_model\.bin"):
        LLM(tmp_path)


def test_a_load_that_cannot_fit_is_refused_before_it_starts(tiny_folder, monkeypatch):
    from octavo import loading

    machine = loading.read_machine("cpu")
    small = dataclasses.replace(machine, total_bytes=1 << 30, available_bytes=170 << 20)
    monkeypatch.setattr(loading, "read_machine", lambda setting: small)
    monkeypatch.setattr(loading, "open_weights", lambda **_: pytest.fail("weights were read"))
    with pytest.raises(errors.NotEnoughMemoryError) as caught:
        LLM(tiny_folder, device="cpu", runner="reference", cache=False, context=512, max_sequences=256)
    assert caught.value.needed_bytes > caught.value.available_bytes
