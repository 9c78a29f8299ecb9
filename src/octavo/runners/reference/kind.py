"""What the reference runner asks for before it is built. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from octavo.dtypes import DTYPE_BYTES
from octavo.models.parameters import Parameter
from octavo.models.spec import ModelSpec
from octavo.quant.format import Format, Layout
from octavo.quant.logical_layout import REF1
from octavo.runners.base import Runner, RunnerConfig
from octavo.runners.reference.limits import CUDA_PROCESS_BYTES, PROCESS_BYTES, activation_bytes

if TYPE_CHECKING:
    from octavo.weights import WeightStore


class ReferenceKind:
    """Plain torch on any device: exact, simple, and as large as full precision."""

    name = "reference"
    layout: Layout = REF1

    def declines(self, spec: ModelSpec, formats: Sequence[Format], config: RunnerConfig) -> str | None:
        if config.kv_dtype == "int8":
            return f"it keeps keys and values in {config.compute_dtype}, not in int8"
        if config.deterministic:
            return "its last bits depend on how a prompt is cut into chunks"
        return None

    def weight_bytes(self, parameter: Parameter, format: Format, config: RunnerConfig) -> int:
        """Matrices are held dequantized in the compute dtype, vectors and routers in fp32."""
        in_fp32 = parameter.role in ("vector", "router")
        item_bytes = 4 if in_fp32 else DTYPE_BYTES[config.compute_dtype]
        return math.prod(parameter.shape) * item_bytes

    def process_bytes(self, config: RunnerConfig) -> int:
        return CUDA_PROCESS_BYTES if config.device.startswith("cuda") else PROCESS_BYTES

    def activation_bytes(self, spec: ModelSpec, config: RunnerConfig) -> int:
        return activation_bytes(spec, config)

    def preload(self, config: RunnerConfig) -> None:
        """Nothing: a runner to check others with may take its time."""

    def create(self, spec: ModelSpec, weights: WeightStore, config: RunnerConfig) -> Runner:
        from octavo.runners.reference.runner import ReferenceRunner

        runner = ReferenceRunner(spec, weights, config)
        weights.close()  # all of it is copied
        return runner
