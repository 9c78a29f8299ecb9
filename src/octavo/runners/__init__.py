"""Runners, and which come first. Asking for the list imports no torch."""

from __future__ import annotations

from octavo.runners.base import RunnerKind
from octavo.runners.cpu.kind import CpuRunnerKind
from octavo.runners.reference import ReferenceKind
from octavo.settings import IsaName, RunnerName


def runner_kinds(runner: RunnerName = "auto", isa: IsaName = "auto") -> tuple[RunnerKind, ...]:
    """The runners that may be taken, fastest first; each says itself what it declines.

    The reference takes everything. `isa` forces the CPU runner's instruction set.
    """
    kinds: tuple[RunnerKind, ...] = (CpuRunnerKind(None if isa == "auto" else isa), ReferenceKind())
    return kinds if runner == "auto" else tuple(kind for kind in kinds if kind.name == runner)
