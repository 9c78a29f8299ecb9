"""Progress bars for long stages (downloading, packing, loading) on standard error, where it is a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from octavo.cli.output import note, stderr_console
from octavo.types import Progress

if TYPE_CHECKING:
    import rich.progress


_PATIENCE_SECONDS = 0.5


class Announcement:
    """The `Progress` that says on one line that a download begins, and no more."""

    def __init__(self) -> None:
        self._said = False

    def __call__(self, stage: str, done_bytes: int, total_bytes: int | None) -> None:
        if stage != "downloading" or self._said or (total_bytes is not None and done_bytes >= total_bytes):
            return
        from octavo.units import readable_bytes

        self._said = True
        note("downloading the model" + ("" if total_bytes is None else f", {readable_bytes(total_bytes)}"))


class Bars:
    """The `Progress` that a load reports to: one bar a stage, in the order they begin, where somebody watches.

    The first appears when the work has taken a while: a start from packed weights is over before, and a display takes
    longer to import than the bar would be there.
    """

    def __init__(self, shown: contextlib.ExitStack) -> None:
        self._shown = shown
        self._began = time.monotonic()
        self._display: rich.progress.Progress | None = None
        self._tasks: dict[str, rich.progress.TaskID] = {}
        self._announce = Announcement()

    def __call__(self, stage: str, done_bytes: int, total_bytes: int | None) -> None:
        self._announce(stage, done_bytes, total_bytes)
        if time.monotonic() - self._began < _PATIENCE_SECONDS:
            return
        if self._display is None:
            self._display = self._shown.enter_context(_display())
        if stage not in self._tasks:
            self._tasks[stage] = self._display.add_task(stage, total=total_bytes)
        self._display.update(self._tasks[stage], completed=done_bytes, total=total_bytes)


def _display() -> rich.progress.Progress:
    """Draws nothing where standard error is no terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    console = stderr_console()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextlib.contextmanager
def progress_bars() -> Iterator[Progress]:
    """Bars while the work lasts, gone after it; where nobody watches, a line for a download alone."""
    with contextlib.ExitStack() as shown:
        yield Bars(shown)


@contextlib.contextmanager
def counting_bar(label: str, total: int) -> Iterator[Callable[[], None]]:
    """One bar over `total` pieces of work, gone after it; call what it gives after each. Silent where nobody
    watches."""
    console = stderr_console()
    if not console.is_terminal:
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as display:
        task = display.add_task(label, total=total)
        yield lambda: display.advance(task)
