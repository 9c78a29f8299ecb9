"""A Python process that answers JSON lines: a peer's library stays out of the process that is measured."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from octavo.errors import IncompatibleModelError

_CLOSE_SECONDS = 10.0


class Child:
    """`module` reads a JSON object a line, and answers each with one; {"error": TEXT} ends it."""

    def __init__(self, module: str, who: str, hello: Mapping[str, Any]) -> None:
        self._who = who
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        # -P: a file in the working folder must not stand in for a library.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self.answer = self.ask(hello)
        except BaseException:
            self.close()
            raise

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Raises IncompatibleModelError where the process ends or says what went wrong."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise IncompatibleModelError(
                f"{self._who} failed: {answer['error']}",
                remedy="Correct that, or leave --peer out.",
            )
        return answer

    def close(self) -> None:
        """Idempotent."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _last_words(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else f"its process ended with status {status}"
