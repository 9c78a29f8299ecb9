"""Rates, spreads and shares against sums done by hand."""

from __future__ import annotations

import dataclasses

import pytest

from octavo.bench.figures import Round, Spread, Workload
from octavo.bench.interleaved import Measured, measure
from octavo.bench.memory import ProcessMemory, from_status, process_memory
from octavo.bench.peer import PeerFacts
from octavo.bench.report import make_report
from octavo.bench.subject import Facts

ALONE = Workload(prompt_tokens=10, new_tokens=5, sequences=1)
FACTS = Facts(
    model="m",
    quant="q4_1 + q8_0",
    device="cpu",
    runner="cpu",
    isa="avx2",
    threads=2,
    processor="p",
    context_tokens=15,
    load_seconds=0.1,
    packed_from_cache=True,
    weight_bytes_per_token=1000,
)
PEER = PeerFacts("peer", "1", "file", "q8_0 + q4_1", None, None)
MEMORY = ProcessMemory(3, 2, 1)


def test_rates_of_one_sequence():
    found = Round.of_sequences(ALONE, [0.5], [2.5])
    assert found == Round(20.0, 2.0, 0.5, 6.0)


def test_rates_of_several_wait_for_the_slowest():
    found = Round.of_sequences(dataclasses.replace(ALONE, sequences=2), [0.5, 1.0], [2.5, 3.0])
    assert found.first_token_seconds == 1.0
    assert found.prefill_tokens_per_second == 20.0
    assert found.decode_tokens_per_second == 8 / 2.5  # the second prompt's time is not taken off
    assert found.total_tokens_per_second == 10.0


def test_prompts_differ_by_round_and_sequence_and_come_again():
    load = Workload(prompt_tokens=16, new_tokens=2, sequences=3)
    prompts = [*load.prompts(100, 0), *load.prompts(100, 1)]
    assert len({tuple(prompt) for prompt in prompts}) == 6
    assert all(0 <= token < 100 for prompt in prompts for token in prompt)
    assert load.prompts(100, 0) == prompts[:3]


def test_spread():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)


def test_memory_of_a_status_file():
    text = "Name:\tx\nVmHWM:\t   10 kB\nRssAnon:\t    3 kB\nRssFile:\t    4 kB\nThreads:\t1\n"
    assert from_status(text) == ProcessMemory(10240, 3072, 4096)
    assert from_status("Name:\tx\n") == ProcessMemory(None, None, None)


def test_memory_of_this_process_grows_with_what_it_holds():
    before = process_memory().peak_bytes
    held = bytearray(64 << 20)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    after = process_memory().peak_bytes
    assert before is not None
    assert after is not None
    assert after >= before
    assert after > 64 << 20


def report(octavo, peer, bandwidth, workload=ALONE, facts=PEER):
    measured = Measured(tuple(octavo), tuple(peer), tuple(bandwidth), MEMORY)
    return make_report(workload, FACTS, facts if peer else None, measured)


def test_ratios_are_taken_within_a_round():
    ours = [Round(10, 10, 1, 10), Round(40, 40, 1, 40), Round(10, 30, 1, 10)]
    theirs = [Round(10, 5, 1, 10), Round(10, 40, 1, 10), Round(10, 10, 1, 10)]
    made = report(ours, theirs, [])
    assert made.ratios is not None
    assert made.ratios["decode_tokens_per_second"] == Spread(2.0, 1.0, 3.0)
    assert made.ratios["prefill_tokens_per_second"] == Spread(1.0, 1.0, 4.0)
    assert made.bandwidth_share is None


@pytest.mark.parametrize(("sequences", "share"), [(1, 0.5), (4, 0.125)])
def test_a_step_reads_the_weights_once_for_all_sequences(sequences, share):
    made = report([Round(1, 50, 1, 1)], [], [100_000.0], dataclasses.replace(ALONE, sequences=sequences))
    assert made.bandwidth_share == Spread(share, share, share)
    assert made.to_json()["bandwidth_share"]["median"] == share


@pytest.mark.parametrize(
    ("format", "differ"), [("q8_0 + q4_1", False), ("q8_0", True), ("bfloat16, dequantized from q8_0", True)]
)
def test_formats_are_compared_as_sets_of_types(format, differ):
    made = report(
        [Round(1, 1, 1, 1)], [Round(1, 1, 1, 1)], [], facts=dataclasses.replace(PEER, format=format)
    )
    assert made.formats_differ is differ
    assert made.to_json()["peer"]["formats_differ"] is differ


class Recorder:
    """Subject and peer at once: remembers who ran with which prompts."""

    def __init__(self):
        self.vocab_size = 50
        self.workload = ALONE
        self.calls = []

    def run(self, what):
        self.calls.append(what)
        return Round(1, 1, 1, 1)

    def memory(self):
        return MEMORY

    def read_bandwidth(self):
        self.calls.append("bandwidth")
        return 5.0


def test_rounds_alternate_who_goes_first():
    both = Recorder()
    ticks = []
    found = measure(both, both, 4, lambda: ticks.append(1))
    warm_up, rounds = both.calls[:2], both.calls[2:]
    assert warm_up[0] == 4
    assert len(ticks) == 5
    who = [("peer" if isinstance(call, list) else call) for call in rounds]
    assert who == [
        0,
        "bandwidth",
        "peer",
        "peer",
        1,
        "bandwidth",
        2,
        "bandwidth",
        "peer",
        "peer",
        3,
        "bandwidth",
    ]
    assert (len(found.octavo), len(found.peer), found.read_bandwidth) == (4, 4, (5.0,) * 4)
    asked = [call for call in both.calls if isinstance(call, list)]
    assert asked[1] == ALONE.prompts(50, 0)
    assert len({str(each) for each in asked}) == 5
