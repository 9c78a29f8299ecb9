"""The child's side of `octavo.bench.child`: JSON lines in, JSON lines out, and nothing else on that channel.

The first line says what to load, the others are {"prompts": [[id]], "new_tokens": n}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol


class Answering(Protocol):
    """A loaded model."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """version and load_seconds."""

    def run(self, prompts: list[list[int]], new_tokens: int) -> Mapping[str, Any]:
        """first_token_seconds and total_seconds of all sequences since the call, and peak_bytes of the process."""


def serve(load: Callable[[dict[str, Any]], Answering]) -> None:
    """Until standard input ends, or an error, which is the last answer."""
    with os.fdopen(os.dup(1), "w") as channel:
        os.dup2(2, 1)  # what libraries print is not an answer
        for answer in _answers(load, iter(sys.stdin)):
            channel.write(json.dumps(answer) + "\n")
            channel.flush()


def _answers(
    load: Callable[[dict[str, Any]], Answering], questions: Iterator[str]
) -> Iterator[Mapping[str, Any]]:
    try:
        model = load(json.loads(next(questions)))
        yield model.facts
        for question in questions:
            yield model.run(**json.loads(question))
    except Exception as error:  # the parent reports it; its text is all there is
        text = str(error).strip().partition("\n")[0]
        yield {"error": f"{type(error).__name__}: {text}"}
