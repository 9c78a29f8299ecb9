"""What may be shown of an answer: a function of the user's sees its text before anyone else, a window at a time.

`module:function` gets the text held back so far and whether it is the last, and returns a verdict: keep it,
replace it, or stop the answer. Only what lies `hold_back` characters behind the end is let go, so that a phrase
cut by a token's border is seen whole. A function that raises ends its answer: nothing more of it is shown.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

from octavo.errors import UsageError

DEFAULT_HOLD_BACK = 64
"""Characters; a function may say its own in an attribute `hold_back`."""

_log = logging.getLogger("octavo")


@dataclass(frozen=True, slots=True)
class Keep:
    """Show it as it is."""


@dataclass(frozen=True, slots=True)
class Replace:
    """Show this in its place."""

    text: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Show this, if anything, and end the answer: its finish_reason is content_filter."""

    text: str = ""


OutputFilter = Callable[[str, bool], Keep | Replace | Stop]
"""(text not shown yet, whether the answer ends with it) -> verdict. Called for each new piece of text; quick."""


class FilteredText:
    """One answer on its way through a filter."""

    def __init__(self, output_filter: OutputFilter) -> None:
        self._filter = output_filter
        self._hold_back = int(getattr(output_filter, "hold_back", DEFAULT_HOLD_BACK))
        self._held = ""
        self.notices: tuple[str, ...] = ()
        """Of a filter that failed: the type of what it raised, since the message may quote what nobody was to see."""

    def push(self, text: str, *, last: bool) -> tuple[str, bool]:
        """(what may be shown now, whether the filter ended the answer)."""
        if not text and not last:
            return "", False
        self._held += text
        try:
            verdict = self._filter(self._held, last)
            if not isinstance(verdict, Keep | Replace | Stop):
                raise TypeError("a filter returns Keep, Replace or Stop")
        except Exception as error:
            _log.error("the output filter failed (%s): its answer was ended", type(error).__name__)
            self.notices = (
                f"error: the output filter failed ({type(error).__name__}): the answer was stopped",
            )
            return "", True
        if isinstance(verdict, Stop):
            return verdict.text, True
        if isinstance(verdict, Replace):
            self._held = verdict.text
        count = len(self._held) if last else max(0, len(self._held) - self._hold_back)
        shown, self._held = self._held[:count], self._held[count:]
        return shown, False


def load_filter(name: str) -> OutputFilter:
    """The function of `module:function`. Runs the module, so the name must be the user's own. Raises UsageError."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"there is no output filter {name}: {error}",
            remedy="Name it as module:function, importable from here.",
        ) from error
    if not callable(found):
        raise UsageError(
            f"{name} is no function", remedy="Name a function (text, last) -> Keep, Replace or Stop."
        )
    filter_: OutputFilter = found
    return filter_
