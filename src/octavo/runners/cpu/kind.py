"""What the native CPU runner takes, and what it asks for before it is built."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from octavo.models.parameters import Parameter
from octavo.models.spec import Attention, DenseMLP, LayerSpec, ModelSpec, MoE
from octavo.quant.format import Format, Layout
from octavo.runners.base import Runner, RunnerConfig
from octavo.runners.cpu import limits
from octavo.runners.cpu.layout import CpuLayout, encoding_of
from octavo.runners.cpu.library import (
    ISA_NAMES,
    IsaName,
    NativeUnavailableError,
    native,
    supported_isas,
)
from octavo.settings import ActivationsName

if TYPE_CHECKING:
    from octavo.weights import WeightStore

_MOST_HEAD_DIM = 512


class CpuRunnerKind:
    """The C++ kernels. `isa` None: the best instruction set of this machine. `activations` int8 trades exactness for
    prefill speed where the processor has an instruction for it: docs/performance.md."""

    name = "cpu"

    def __init__(self, isa: IsaName | None = None, activations: ActivationsName = "int16") -> None:
        self._isa = isa
        self._activations: ActivationsName = activations

    @property
    def layout(self) -> Layout:
        """Rows interleaved by as many as the instruction set has lanes; by 8 where there are no kernels."""
        try:
            return CpuLayout(native().octavo_isa_lanes(ISA_NAMES.index(self.isa)))
        except NativeUnavailableError:
            return CpuLayout(8)

    @property
    def isa(self) -> IsaName:
        """Raises NativeUnavailableError where there are no kernels."""
        return supported_isas()[-1] if self._isa is None else self._isa

    def declines(self, spec: ModelSpec, formats: Sequence[Format], config: RunnerConfig) -> str | None:
        if config.device != "cpu":
            return f"it runs on the CPU, not on {config.device}"
        try:
            if self.isa not in supported_isas():
                return f"this machine has no {self._isa}, only {', '.join(supported_isas())}"
        except NativeUnavailableError as error:
            return str(error)
        if config.compute_dtype != "float32":
            return f"it computes in float32, not in {config.compute_dtype}"
        if config.kv_dtype != "float16":
            return f"it keeps keys and values in float16, not in {config.kv_dtype}"
        for chosen in formats:
            # Whether there are kernels depends on the groups, not on the columns.
            if encoding_of(chosen, 64, 8) is None:
                return f"it has no kernels for the format {chosen.name}"
        return next(filter(None, map(_declines_layer, spec.layers)), None)

    def weight_bytes(self, parameter: Parameter, format: Format, config: RunnerConfig) -> int:
        """Kernels read the cache's mapped pages in place, or a copy that replaces them (`huge_pages`); only norms and
        biases are held twice."""
        return 4 * parameter.shape[0] if parameter.role == "vector" else 0

    def process_bytes(self, config: RunnerConfig) -> int:
        return limits.PROCESS_BYTES

    def activation_bytes(self, spec: ModelSpec, config: RunnerConfig) -> int:
        return limits.activation_bytes(spec, config, thread_count(config))

    def preload(self, config: RunnerConfig) -> None:
        """Nothing: it imports nothing heavy."""

    def create(self, spec: ModelSpec, weights: WeightStore, config: RunnerConfig) -> Runner:
        from octavo.runners.cpu.runner import CpuRunner

        return CpuRunner(
            spec,
            weights,
            config,
            isa=self.isa,
            threads=thread_count(config),
            activations=self._activations,
        )


def thread_count(config: RunnerConfig) -> int:
    """What the plan says, else every logical CPU."""
    return config.threads or os.cpu_count() or 1


def _declines_layer(layer: LayerSpec) -> str | None:
    mixer, ffn = layer.mixer, layer.ffn
    if not isinstance(mixer, Attention):
        return f"it has no kernels for {type(mixer).__name__}"
    if not isinstance(ffn, DenseMLP | MoE):
        return f"it has no kernels for {type(ffn).__name__}"
    if mixer.head_dim > _MOST_HEAD_DIM:
        return f"heads of {mixer.head_dim} dims: it takes up to {_MOST_HEAD_DIM}"
    return None
