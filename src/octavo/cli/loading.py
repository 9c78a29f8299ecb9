"""Loads the model a command asked for, with progress bars, and takes its announced fallback where it must."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.cli.configuration import Configuration, Resolved
from octavo.cli.output import note, note_all
from octavo.cli.progress import progress_bars
from octavo.errors import ModelNotFoundError, NotEnoughMemoryError

if TYPE_CHECKING:
    from octavo.llm import LLM


@dataclass(frozen=True, slots=True)
class Loaded:
    llm: LLM
    resolved: Resolved
    """What holds for the model that was loaded, which may be the fallback."""


@contextlib.contextmanager
def loaded_model(configuration: Configuration) -> Iterator[Loaded]:
    """The model, closed afterwards. Raises what `LLM.from_settings` raises where no fallback is left."""
    note_all(configuration.notices)
    loaded = _load(configuration, configuration.resolve())
    try:
        yield loaded
    finally:
        loaded.llm.close()


def _load(configuration: Configuration, resolved: Resolved) -> Loaded:
    from octavo.llm import LLM
    from octavo.validate import validate_sampling_params

    # A parameter out of range is known before the model is; ids are checked again against its vocabulary.
    validate_sampling_params(resolved.sampling, vocab_size=1 << 31)
    try:
        with progress_bars() as progress:
            return Loaded(LLM.from_settings(resolved.settings, progress=progress), resolved)
    except (ModelNotFoundError, NotEnoughMemoryError) as error:
        if resolved.fallback is None:
            raise
        note(f"{error.message}: taking the fallback {resolved.fallback}")
        fallback = resolved.fallback
    return _load(configuration, configuration.resolve(fallback))
