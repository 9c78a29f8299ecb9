"""Standard output carries the text (or JSON) alone; everything else a person reads goes to standard error.

A reader who closes standard output early (`| head`) ends the command quietly.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_CONTROLS = {code: "�" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def write(text: str) -> None:
    """Write text a model made, at once. A terminal is not shown its control characters."""
    _write(text.translate(_CONTROLS) if sys.stdout.isatty() else text)


def write_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    _write(json_line(value))


def json_line(value: Mapping[str, Any] | Sequence[Any]) -> str:
    """One JSON value on one line. What JSON cannot say, NaN and the infinities, is null."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=str) + "\n"


def write_table(*tables: RenderableType) -> None:
    """Write rich tables and text, colored and wrapped on a terminal only."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 10_000
    console = Console(highlight=False, width=width)
    with console.capture() as captured:
        console.print(*tables, sep="\n")
    _write("".join(line.rstrip(" ") + "\n" for line in captured.get().splitlines()))


def note(text: str) -> None:
    """Tell the person something on standard error, on one line."""
    stderr_console().print(one_line(text), style="dim", markup=False)


def note_all(texts: Iterable[str]) -> None:
    for text in texts:
        note(text)


def one_line(text: str) -> str:
    return " ".join(text.translate(_CONTROLS).split("\n"))


def stderr_console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered must go somewhere, or the interpreter complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
