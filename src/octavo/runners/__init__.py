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

    The reference takes everything. An `isa` asks for the CPU runner with it, and no other; int8 activations for a
    runner that has them.
    """
    if isa != "auto":
        return (CpuRunnerKind(isa, activations),)
    kinds: tuple[RunnerKind, ...] = (CudaRunnerKind(activations), CpuRunnerKind(None, activations))
    if activations == "int16":
        kinds += (ReferenceKind(),)
    return kinds if runner == "auto" else tuple(kind for kind in kinds if kind.name == runner)
