"""Runs the command in this process, with a fake `LLM` that answers at once and remembers what it was asked."""

from __future__ import annotations

import io
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from octavo.cli.main import main
from octavo.errors import ContextLengthError
from octavo.settings import SamplingParams, Settings
from octavo.types import Completion, FinishReason, Message, Progress, TextEvent, Timings, Usage


class FakeLLM:
    """One of these stands for every model a test loads; its words are its tokens."""

    def __init__(self) -> None:
        self.answer = "The sky is blue."
        self.has_chat_template = True
        self.notices: tuple[str, ...] = ()
        self.context_tokens = 64
        self.load_errors: list[BaseException] = []
        """Raised by the next loads, one each."""
        self.errors: list[BaseException] = []
        """Raised by the next requests, one each."""
        self.interrupt_after: int | None = None
        self.loads: list[Settings] = []
        self.asked: list[tuple[str, Any, SamplingParams]] = []
        """(raw | chat, prompt or messages, params)"""
        self.closed = 0

    def from_settings(self, settings: Settings, *, progress: Progress | None = None) -> FakeLLM:
        self.loads.append(settings)
        if self.load_errors:
            raise self.load_errors.pop(0)
        if progress is not None:
            progress("loading", 1, 2)
        return self

    def generate(self, prompt: str, params: SamplingParams) -> Completion:
        return self._done("raw", prompt, params)

    def chat(self, messages: Sequence[Message], params: SamplingParams) -> Completion:
        return self._done("chat", messages, params)

    def stream(self, prompt: str, params: SamplingParams) -> Iterator[TextEvent]:
        return self._events(self._done("raw", prompt, params))

    def stream_chat(self, messages: Sequence[Message], params: SamplingParams) -> Iterator[TextEvent]:
        return self._events(self._done("chat", list(messages), params))

    def count_chat_tokens(self, messages: Sequence[Message]) -> int:
        return sum(len(message["content"].split()) for message in messages)

    def info(self) -> dict[str, Any]:
        return {
            "model": "fake",
            "revision": None,
            "quant": "int8",
            "quantized_as": ["q4_1"],
            "device": "cpu",
            "device_reason": "auto found no usable GPU: none",
            "runner": "reference",
            "max_sequences": self.loads[-1].max_sequences or 1,
            "load_seconds": 0.25,
            "memory": {"weights": 3 << 20, "kv": 1 << 20},
            "card": None,
            "compiled": {"graphs": 0},
        }

    def close(self) -> None:
        self.closed += 1

    def _done(self, kind: str, prompt: Any, params: SamplingParams) -> Completion:
        self.asked.append((kind, prompt, params))
        if self.errors:
            raise self.errors.pop(0)
        words = self.answer.split()
        if kind == "chat" and self.count_chat_tokens(prompt) > self.context_tokens:
            raise ContextLengthError("too long", remedy="less", prompt_tokens=65, context_tokens=64)
        return Completion(
            text=self.answer,
            token_ids=tuple(range(len(words))),
            finish_reason=FinishReason.STOP,
            prompt_token_ids=(1, 2, 3),
            usage=Usage(prompt_tokens=3, completion_tokens=len(words)),
            timings=Timings(
                queued_seconds=0.0,
                first_token_seconds=0.5,
                total_seconds=1.0,
                prefill_tokens_per_second=6.0,
                decode_tokens_per_second=12.5,
            ),
            seed=7,
        )

    def _events(self, done: Completion) -> Iterator[TextEvent]:
        pieces = [piece for word in done.text.split(" ") for piece in (word, " ")][:-1]
        for position, piece in enumerate(pieces):
            if position == self.interrupt_after:
                raise KeyboardInterrupt
            yield TextEvent(piece, (position,))
        yield TextEvent("", (), FinishReason.STOP, done)


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def err_lines(self) -> list[str]:
        return self.err.splitlines()


@dataclass
class Cli:
    """Calls `octavo ARGS` in this process."""

    monkeypatch: pytest.MonkeyPatch
    llm: FakeLLM = field(default_factory=FakeLLM)

    def __call__(self, *arguments: str, stdin: bytes | None = None, terminal: bool = False) -> Outcome:
        """`stdin` None: nothing is piped in. `terminal`: all three streams are one."""
        kind: Callable[..., io.TextIOWrapper] = Terminal if terminal else io.TextIOWrapper
        given = io.TextIOWrapper if stdin is not None and not terminal else Terminal
        out, err = io.BytesIO(), io.BytesIO()
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", given(io.BytesIO(stdin or b""), encoding="utf-8"))
            patch.setattr(sys, "stdout", kind(out, encoding="utf-8", write_through=True))
            patch.setattr(sys, "stderr", kind(err, encoding="utf-8", write_through=True))
            code = main(list(arguments))
            return Outcome(code, out.getvalue().decode(), err.getvalue().decode())


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """The command in an empty folder and home, without OCTAVO_* variables, on a fake model."""
    for name in [name for name in os.environ if name.startswith("OCTAVO_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    cli = Cli(monkeypatch)
    fake = types.ModuleType("octavo.llm")
    fake.LLM = cli.llm  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "octavo.llm", fake)
    return cli
