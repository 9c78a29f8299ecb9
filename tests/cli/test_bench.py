"""`octavo bench` as a user calls it, on a fake subject; and once for real on the default model."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import ClassVar

import pytest

from octavo.bench import subject, tuning
from octavo.bench.figures import Round
from octavo.bench.memory import ProcessMemory
from octavo.bench.subject import Facts
from octavo.bench.tuning import Tuned


class FakeSubject:
    """Answers at once; the settings and workloads it was given are kept."""

    given: ClassVar[list[object]] = []
    notices = ("packed again",)
    vocab_size = 100

    def __init__(self, settings, workload, progress=None):
        self.given.append((settings, workload))
        self.workload = workload
        self.facts = Facts(
            "fake", "int8", "cpu", "cpu", "avx2", 2, "a processor", 256, 0.25, True, 140_000_000
        )

    def run(self, number):
        return Round(500.0, 100.0 + number, 0.25, 150.0)

    def memory(self):
        return ProcessMemory(200 << 20, 60 << 20, 140 << 20)

    def read_bandwidth(self):
        return 28e9

    def close(self):
        self.given.append("closed")


@pytest.fixture
def fake(cli, monkeypatch):
    monkeypatch.setattr(FakeSubject, "given", [])
    monkeypatch.setattr(subject, "Subject", FakeSubject)
    return cli


def test_table(fake):
    done = fake("bench", "--quant", "int8", "--repeat", "3", "--batch", "2", "--threads", "2")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0] == (
        "fake, int8 on cpu (cpu runner, avx2, 2 threads; a processor): "
        "2 sequences of 128 prompt + 128 new tokens"
    )
    rows = {" ".join(line.split()) for line in lines}
    assert rows >= {
        "decode, tokens/s 101.0 (100.0 .. 102.0)",
        "peak memory 200 MiB (60 MiB anonymous + 140 MiB of files in the end)",
        "load 0.25 s (packed weights from the cache)",
        "share of it 25% (25% .. 26%) by decoding's weights",
    }
    assert done.err == "packed again\n"
    (settings, workload), closed = FakeSubject.given
    assert (settings.quant, settings.threads, workload.sequences, closed) == ("int8", 2, 2, "closed")


def test_json(fake):
    done = fake("bench", "--json", "--prompt-tokens", "7", "--max-new-tokens", "9")
    found = json.loads(done.out)
    assert found["workload"] == {"prompt_tokens": 7, "new_tokens": 9, "sequences": 1}
    assert found["decode_tokens_per_second"] == {"median": 102.0, "least": 100.0, "most": 104.0}
    assert found["read_bandwidth_bytes_per_second"]["median"] == 28e9
    assert found["weight_bytes_per_token"] == 140_000_000
    assert found["peer"] is None
    assert {field.name for field in dataclasses.fields(Facts)} <= set(found)


@pytest.mark.parametrize(
    ("arguments", "error", "fix"),
    [
        (["--peer", "vllm"], "there is no peer 'vllm'", "--peer transformers or --peer llama.cpp"),
        (["--peer", "transformers=int4"], "does not run as 'int4'", "bf16, fp32"),
        (["--peer-model", "x.gguf"], "--peer-model is given without a peer", "Add --peer"),
        (["--batch", "0"], "--batch", "octavo bench --help"),
        (["--max-new-tokens", "1"], "--max-new-tokens", "octavo bench --help"),
        (["--repeat", "none"], "--repeat", "octavo bench --help"),
        (["--max-sequences", "2"], "--max-sequences", "octavo bench --help"),
    ],
)
def test_wrong_arguments_say_what_to_do(fake, arguments, error, fix):
    done = fake("bench", *arguments)
    assert done.code == 2
    assert len(done.err_lines) == 2
    assert error in done.err_lines[0]
    assert fix in done.err_lines[1]
    assert FakeSubject.given == []


def test_tiles_are_tuned_first(fake, monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "tune_tiles", lambda settings, seconds, progress: Tuned(5, tmp_path))
    done = fake("bench", "--tune", "--repeat", "1")
    assert done.code == 0
    assert done.err_lines[0] == f"tiles of 5 shapes were tuned and are kept in {tmp_path}"


@pytest.mark.model
def test_tuning_is_for_cuda(cli, default_model_path):
    done = cli("bench", "--model", str(default_model_path), "--device", "cpu", "--tune")
    assert done.code == 2
    assert "only the CUDA runner has tiles to tune" in done.err_lines[0]


@pytest.mark.model
def test_for_real_on_the_default_model(default_model_path, tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "octavo", "bench", "--json", "-m", str(default_model_path)),
            *("--repeat", "1", "--prompt-tokens", "16", "--max-new-tokens", "8", "--device", "cpu"),
        ],
        env=os.environ | {"OCTAVO_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found = json.loads(done.stdout)
    assert found["packed_from_cache"] is False
    assert found["quant"] == "q4_1 + q8_0"
    # The head is the table: all of it is read for every token.
    assert 0.9 * 98.4e6 < found["weight_bytes_per_token"] < 98.4e6
    # The whole packed model and some anonymous memory were resident; torch, half a gigabyte, was not.
    assert 98e6 < found["peak_bytes"] < 500e6
    assert found["decode_tokens_per_second"]["median"] > 1
    assert 0 < found["bandwidth_share"]["median"] < 1.2
