"""Every error class, through the command: its exit code, two lines on standard error, nothing on standard output."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo import errors
from octavo.errors import NotEnoughMemoryError, OctavoError

DRAWN = re.findall(r"(\w+Error) +(\d+) +(\w+)", errors.__doc__ or "")
"""(class, exit code, code) as the module's drawing has them, without the base."""


def classes(base: type[OctavoError] = OctavoError) -> Iterator[type[OctavoError]]:
    for cls in base.__subclasses__():
        if cls.__module__ == errors.__name__:
            yield cls
            yield from classes(cls)


CLASSES = sorted(classes(), key=lambda cls: cls.__name__)


def example(cls: type[OctavoError]) -> OctavoError:
    """An instance whose texts would break the two lines if they were printed as they are."""
    values: dict[str, Any] = {"remedy": "do\nthis", "parameter": "top_p", "key": "rope"}
    more = {
        name: values.get(name, 1)
        for name in inspect.signature(cls).parameters
        if name not in ("self", "message")
    }
    return cls("what [red]happened[/red]\nto \x1b[31mwhat", **more)


def test_the_drawing_has_every_class():
    assert len(DRAWN) >= 20
    assert sorted(DRAWN) == [(cls.__name__, str(cls.exit_code), cls.code) for cls in CLASSES]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("at", ["load", "request"])
def test_two_lines_and_the_exit_code(cli, cls, at):
    (cli.llm.load_errors if at == "load" else cli.llm.errors).append(example(cls))
    done = cli("generate", "hello")
    assert done.code == next(int(code) for name, code, _ in DRAWN if name == cls.__name__)
    assert done.out == ""
    assert done.err_lines == ["error: what [red]happened[/red] to \ufffd[31mwhat", "  fix: do this"]
    assert cli.llm.closed == (at == "request")


def test_an_error_in_the_middle_keeps_what_was_printed(cli, monkeypatch):
    error = NotEnoughMemoryError("full", remedy="less", needed_bytes=2, available_bytes=1)

    def events(done):
        yield from list(type(cli.llm)._events(cli.llm, done))[:3]
        raise error

    monkeypatch.setattr(cli.llm, "_events", events)
    done = cli("generate", "hello")
    assert (done.code, done.out) == (4, "The sky")
    assert done.err_lines == ["error: full", "  fix: less"]


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (MemoryError(), 4, "out of memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
            4,
            "out of",
        ),
        (
            type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried 2 GiB\nmore"),
            4,
            "out of memory",
        ),
        (OSError(28, "No space left on device"), 4, "disk is full"),
        (KeyError("x"), 1, "internal error: KeyError"),
        (RecursionError("deep"), 1, "internal error: RecursionError"),
    ],
)
def test_errors_that_are_not_ours(cli, raised, code, said):
    cli.llm.errors.append(raised)
    done = cli("generate", "hello")
    assert (done.code, done.out, len(done.err_lines)) == (code, "", 2)
    assert said in done.err_lines[0]
    assert "Traceback" not in done.err


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_debug_shows_the_traceback_before_the_two_lines(cli, monkeypatch, how):
    cli.llm.errors.append(KeyError("x"))
    if how == "variable":
        monkeypatch.setenv("OCTAVO_DEBUG", "1")
    done = cli("generate", "hello", *(["--debug"] if how == "flag" else []))
    assert done.code == 1
    assert done.err_lines[0].startswith("Traceback")
    assert done.err_lines[-2].startswith("error: ")


def test_an_interrupt_keeps_the_text(cli):
    cli.llm.interrupt_after = 3
    done = cli("generate", "hello")
    assert (done.code, done.out, done.err) == (130, "The sky", "")
    assert cli.llm.closed == 1
    assert cli("generate", "hello", terminal=True).out == "The sky\n"


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "said", "remedy"),
    [
        (["generate"], None, 2, "no prompt", "--file FILE"),
        (["generate", "a", "--file", "f"], None, 2, "both PROMPT and --file", "one of them"),
        (["generate", "--file", "missing.txt"], None, 2, "missing.txt", "path"),
        (["generate", "--batch", "missing.jsonl"], None, 2, "missing.jsonl", "path"),
        (["generate", "a", "--batch", "b.jsonl"], None, 2, "--batch", "one of them"),
        (["generate", "a", "--logprobs", "2"], None, 2, "--logprobs goes with --json", "Add --json"),
        (["generate", "a", "--prompt-logprobs", "2"], None, 2, "--prompt-logprobs goes with", "Add --json"),
        (["generate", "--batch", "b.jsonl", "--no-stream"], None, 2, "--no-stream", "out"),
        (["generate", "a", "--raw", "--system", "b"], None, 2, "--raw", "Leave one"),
        (["generate", ""], None, 7, "empty", ""),
        (["generate", "-"], b"", 7, "empty", ""),
        (["generate"], b"", 7, "empty", ""),
        (["generate", "-"], b"caf\xe9", 7, "offset 3", "UTF-8"),
        (["generate", "caf\udce9"], None, 7, "offset 3", "UTF-8"),
        (["generate", "a", "--temperature", "-1"], None, 2, "temperature", ""),
        (["generate", "a", "--top-p", "nan"], None, 2, "top_p", ""),
        (["generate", "a", "--max-new-tokens", "0"], None, 2, "max_new_tokens", ""),
        (["generate", "a", "--max-new-tokens", "many"], None, 2, "--max-new-tokens", "--help"),
        (["generate", "a", "--quant", "int3"], None, 2, "int3", "--help"),
        (["generate", "a", "--temprature", "1"], None, 2, "--temprature", "--temperature"),
        (["genrate", "a"], None, 2, "genrate", "--help"),
        (["generate", "a", "b"], None, 2, "b", "--help"),
        (["models"], None, 2, "Missing command", "--help"),
        (["plan", "a", "-m", "b"], None, 2, "twice", "one"),
        (["cache", "prune"], None, 2, "what to remove", "--all"),
    ],
)
def test_what_a_user_gets_wrong(cli, arguments, stdin, code, said, remedy):
    done = cli(*arguments, stdin=stdin)
    assert (done.code, done.out, len(done.err_lines)) == (code, "", 2), done
    assert said in done.err_lines[0]
    assert remedy in done.err_lines[1]
    assert not cli.llm.asked


def octavo(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "octavo", *arguments],
        input=stdin,
        capture_output=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("arguments", "stdin", "code"),
    [
        (["generate", "--file", "no such file"], b"", 2),
        (["generate", "-"], b"\xff", 7),
        (["generate", "hello", "-m", "no/such/folder", "--offline"], b"", 3),
        (["generate", "hello", "--device", "tpu"], b"", 2),
    ],
)
def test_as_a_process(arguments, stdin, code):
    done = octavo(*arguments, stdin=stdin)
    assert (done.returncode, done.stdout) == (code, b"")
    first, second = done.stderr.decode().splitlines()
    assert first.startswith("error: ")
    assert second.startswith("  fix: ")


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell")
def test_streams_that_the_shell_closed(tmp_path):
    command = f"{shlex.quote(sys.executable)} -m octavo generate -m ./nowhere <&- >&- 2>{tmp_path}/err"
    assert subprocess.run(command, shell=True, check=False, timeout=60).returncode == 7
    assert "the prompt is empty" in (tmp_path / "err").read_text()


def test_a_reader_who_leaves_early_is_no_error():
    with subprocess.Popen(
        [sys.executable, "-m", "octavo", "generate", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.skipif(os.name != "posix", reason="a POSIX signal")
def test_an_interrupt_while_the_command_starts_is_quiet(tmp_path):
    """The first thing that is imported interrupts it."""
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    package = str(Path(errors.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-m", "octavo", "--help"],
        check=False,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{tmp_path}:{package}"},
    )
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "")
