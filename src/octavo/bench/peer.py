"""What `bench` asks of another engine, each in processes of its own, and the checkpoint it is given.

A peer gets no favor and no handicap: the same prompts' lengths and threads, and its own usual way to generate.
Formats are stated, and never assumed equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from octavo.bench.figures import Round
from octavo.types import ModelSource


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a peer reads."""

    source: ModelSource
    path: Path | None
    """The folder, or the .gguf file; None for a repository of the hub."""

    @property
    def format(self) -> str:
        """ "q4_1 + q8_0"; empty in full precision."""
        return " + ".join(self.source.quantized_as)


@dataclass(frozen=True, slots=True)
class PeerFacts:
    name: str
    version: str
    reads: str
    format: str
    """In which it computes."""
    load_seconds: float | None
    peak_bytes: int | None
    """Most that was resident so far. None where it is not measured."""


class Peer(Protocol):
    @property
    def facts(self) -> PeerFacts: ...

    def run(self, prompts: list[list[int]]) -> Round:
        """Raises IncompatibleModelError where the peer fails."""

    def close(self) -> None: ...
