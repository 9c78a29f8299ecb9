"""Where a batch's answers go: standard output, or a file that a later run goes on with.

The file is JSON Lines, one answer a line with its id. It is only ever replaced as a whole or added to, so that
a run that was killed leaves at most a half-written last line, which the next run takes away.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from octavo.cli.output import json_line, write_json
from octavo.errors import UsageError

WriteAnswer = Callable[[Mapping[str, Any]], None]


def answer_key(identity: Any) -> str:
    """Ids are any JSON value; equal ones have equal keys."""
    return json.dumps(identity, sort_keys=True)


def earlier_answers(path: Path) -> Counter[str]:
    """How often each id is answered in a file that a run began; none where there is no file.

    Takes a half-written last line out of it, and lines that failed: they are asked again. Raises UsageError where
    the file holds anything else, which is left as it is.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Counter()
    except OSError as error:
        raise _unusable(path, error) from error
    *lines, unfinished = data.split(b"\n")
    kept, answered = [], Counter[str]()
    for number, line in enumerate(lines, 1):
        answer = _answer(line)
        if answer is None:
            raise UsageError(
                f"line {number} of {path} is not an answer of a batch", remedy="Name another --output."
            )
        if "error" not in answer:
            kept.append(line + b"\n")
            answered[answer_key(answer["id"])] += 1
    if unfinished or len(kept) < len(lines):
        _replace(path, b"".join(kept))
    return answered


@contextlib.contextmanager
def answers_to(path: Path | None) -> Iterator[WriteAnswer]:
    """Adds answers to the file, each at once; prints them where there is none."""
    if path is None:
        yield write_json
        return
    try:
        file = path.open("ab")
    except OSError as error:
        raise _unusable(path, error) from error
    with file:

        def add(answer: Mapping[str, Any]) -> None:
            file.write(json_line(answer).encode())
            file.flush()

        yield add


def _answer(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and "id" in value and value.keys() & {"text", "error"} else None


def _replace(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise _unusable(path, error) from error


def _unusable(path: Path, error: OSError) -> UsageError:
    return UsageError(
        f"cannot use {path} for the answers: {error.strerror or error}",
        remedy="Check the path and its permissions.",
    )
