"""Signals and pipes, on a real process with the default model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.model

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture(scope="module")
def start(default_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Starts `octavo COMMAND` on a small context, with packed weights of its own."""
    folder = tmp_path_factory.mktemp("process")

    def started(command: str, *arguments: str) -> subprocess.Popen[bytes]:
        fixed = ["-m", str(default_model_path), "--context", "1024", "--device", "cpu", "--seed", "1"]
        return subprocess.Popen(
            [sys.executable, "-m", "octavo", command, *fixed, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=os.environ | {"OCTAVO_CACHE": str(folder / "cache")},
            # A test run in the background of a shell without job control inherits SIGINT ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 (no threads here)
        )

    return started


def test_ctrl_c_keeps_the_partial_text(start):
    with start("generate", "Tell me a long story.", "--ignore-eos", "--max-new-tokens", "900") as process:
        first = process.stdout.read(8)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(first) == 8
    assert b"Traceback" not in errors
    assert b"error" not in errors
    assert len(rest) < 4000


def test_a_reader_who_has_enough_ends_it_quietly(start):
    with start("generate", "Tell me a long story.", "--ignore-eos", "--max-new-tokens", "900") as process:
        assert len(process.stdout.read(8)) == 8
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 0
    assert b"error" not in errors
    assert b"Broken" not in errors
    assert b"Traceback" not in errors


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(start):
    with start("chat", "--ignore-eos", "--max-new-tokens", "100") as process:
        process.stdin.write(b"Tell me a long story.\n")
        process.stdin.flush()
        assert len(process.stdout.read(8)) == 8
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(b"And then?\n/exit\n", timeout=100)
    assert process.returncode == 0, errors
    assert b"stopped" in errors
    assert errors.count(b"+ 100 new tokens") == 1
    assert rest.endswith(b"\n")
