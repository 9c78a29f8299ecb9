"""An error as two lines on standard error: what happened, and what to do next."""

from __future__ import annotations

from octavo.cli.output import one_line, stderr_console
from octavo.errors import OctavoError


def report(error: OctavoError) -> None:
    console = stderr_console()
    console.print("error: ", style="bold red", end="", markup=False)
    console.print(one_line(error.message), markup=False)
    console.print("  fix: ", style="bold", end="", markup=False)
    console.print(one_line(error.remedy), markup=False)
