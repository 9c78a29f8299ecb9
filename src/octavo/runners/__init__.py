"""Runners, and which come first. Asking for the list imports no torch."""

from __future__ import annotations

from octavo.runners.base import RunnerKind
from octavo.runners.cpu.kind import CpuRunnerKind
from octavo.runners.cuda.kind import CudaRunnerKind
from octavo.runners.reference import ReferenceKind
from octavo.settings import ActivationsName, IsaName, RunnerName


def runner_kinds(
    runner: RunnerName = "auto", isa: IsaName = "auto", activations: ActivationsName = "int16"
) -> tuple[RunnerKind, ...]:
    """The runners that may be taken, fastest first; each says itself what it declines.

    The reference takes everything. An `isa`, or int8 activations, ask for the CPU runner with them, and no other.
    """
    if isa != "auto" or activations != "int16":
        return (CpuRunnerKind(None if isa == "auto" else isa, activations),)
    kinds: tuple[RunnerKind, ...] = (CudaRunnerKind(), CpuRunnerKind(), ReferenceKind())
    return kinds if runner == "auto" else tuple(kind for kind in kinds if kind.name == runner)
