"""Loads the model a command asked for, with progress bars, and takes its announced fallback where it must."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from octavo.cli.configuration import Configuration, Resolved, check
from octavo.cli.output import note, note_all
from octavo.cli.progress import progress_bars
from octavo.errors import ModelNotFoundError, NotEnoughMemoryError
from octavo.settings import Settings
from octavo.types import Progress

if TYPE_CHECKING:
    from octavo.llm import LLM

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Loaded:
    llm: LLM
    resolved: Resolved
    """What holds for the model that was loaded, which may be the fallback."""


@contextlib.contextmanager
def loaded_model(configuration: Configuration) -> Iterator[Loaded]:
    """The model, closed afterwards. Raises what `LLM.from_settings` raises where no fallback is left."""

    def load(settings: Settings, progress: Progress | None) -> LLM:
        from octavo.llm import LLM  # after the check: it takes seconds to import

        return LLM.from_settings(settings, progress=progress)

    loaded = Loaded(*with_fallback(configuration, load))
    try:
        yield loaded
    finally:
        loaded.llm.close()


def with_fallback(
    configuration: Configuration, load: Callable[[Settings, Progress | None], ResultT]
) -> tuple[ResultT, Resolved]:
    """What `load` returns for the model asked for or else, announced, for its fallback; and what held for it.

    Raises InvalidParameterError before anything is loaded, and what `load` raises where no fallback is left.
    """
    note_all(configuration.notices)
    resolved = configuration.resolve()
    while True:
        check(resolved)
        try:
            with progress_bars() as progress:
                return load(resolved.settings, progress), resolved
        except (ModelNotFoundError, NotEnoughMemoryError) as error:
            if resolved.fallback is None:
                close = configuration.close_names(resolved.settings.model)
                if close and isinstance(error, ModelNotFoundError):
                    error.remedy = f"Did you mean {close}? {error.remedy}"
                raise
            note(f"{error.message}: taking the fallback {resolved.fallback}")
            resolved = configuration.resolve(resolved.fallback)
