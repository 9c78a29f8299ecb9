"""What the CUDA runner takes, and what it asks for before it is built. Imports neither torch nor triton."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING

from octavo.devices import Unusable, read_cuda_driver
from octavo.models.parameters import Parameter
from octavo.models.spec import Attention, DenseMLP, ModelSpec
from octavo.quant.format import Format, Layout
from octavo.runners.base import Runner, RunnerConfig
from octavo.runners.cuda import limits
from octavo.runners.cuda.layout import CUDA_B64, encoding_of
from octavo.settings import ActivationsName

if TYPE_CHECKING:
    from octavo.weights import WeightStore

_LEAST_CAPABILITY = (8, 0)
_MOST_HEAD_DIM = 256
_MOST_GROUP = 16
_MOST_HIDDEN = 32768


class CudaRunnerKind:
    """Triton kernels, one CUDA graph a decode step. `activations` int8 trades exactness for prefill speed where weights
    are int8: docs/performance.md."""

    name = "cuda"
    layout: Layout = CUDA_B64

    def __init__(self, activations: ActivationsName = "int16") -> None:
        self._activations: ActivationsName = activations
        self._preloading: threading.Thread | None = None

    def declines(self, spec: ModelSpec, formats: Sequence[Format], config: RunnerConfig) -> str | None:
        if not config.device.startswith("cuda"):
            return f"it runs on CUDA devices, not on {config.device}"
        if find_spec("triton") is None:
            return "triton is not installed"
        if config.compute_dtype == "float32":
            return "it computes in 16 bits and fixed point, not in float32"
        if config.kv_dtype not in ("bfloat16", "float16", "int8"):
            return f"it keeps keys and values in 16 bits or int8, not in {config.kv_dtype}"
        if config.max_slots > limits.LARGEST_BATCH:
            return f"it decodes up to {limits.LARGEST_BATCH} sequences together, not {config.max_slots}"
        for chosen in formats:
            if encoding_of(chosen) is None:
                return f"it has no kernels for the format {chosen.name}"
        if self._activations == "int8" and not any(_takes_int8(chosen) for chosen in formats):
            return f"its int8 activations are for int8 weights, not for {', '.join(f.name for f in formats)}"
        if config.deterministic and self._activations == "int8":
            return "int8 activations are for prompts alone, deterministic is one arithmetic for all"
        if config.deterministic and config.kv_dtype not in ("bfloat16", "float16"):
            return "deterministic, it keeps keys and values in 16 bits"
        if spec.hidden_size > _MOST_HIDDEN:
            return f"vectors of {spec.hidden_size}: its norms take up to {_MOST_HIDDEN}"
        return next(filter(None, map(_declines_layer, spec.layers)), None) or _declines_card(config.device)

    def weight_bytes(self, parameter: Parameter, format: Format, config: RunnerConfig) -> int:
        if parameter.role == "vector":
            return 4 * math.prod(parameter.shape)
        encoding = encoding_of(format)
        rows, columns = parameter.shape
        return 0 if encoding is None else rows * encoding.row_bytes(columns)

    def process_bytes(self, config: RunnerConfig) -> int:
        return limits.PROCESS_BYTES

    def activation_bytes(self, spec: ModelSpec, config: RunnerConfig) -> int:
        return limits.LIBRARY_BYTES + limits.activation_bytes(spec, config)

    def preload(self, config: RunnerConfig) -> None:
        if self._preloading is None:
            # No daemons: the interpreter must not go down under a library that is just being loaded.
            threading.Thread(target=_hash_compiler, name="octavo-preload-triton").start()
            self._preloading = threading.Thread(target=_preload, args=(config.device,), name="octavo-preload")
            self._preloading.start()

    def create(self, spec: ModelSpec, weights: WeightStore, config: RunnerConfig) -> Runner:
        if self._preloading is not None:
            self._preloading.join()
        from octavo.runners.cuda.runner import CudaRunner

        runner = CudaRunner(spec, weights, config, activations=self._activations)
        weights.close()  # all of it is copied
        return runner


def _takes_int8(format: Format) -> bool:
    encoding = encoding_of(format)
    return encoding is not None and encoding.is_int8


def _preload(device: str) -> None:
    """Import the runner, which takes seconds, and make the device's context."""
    with suppress(Exception):  # `create` meets it again
        import torch

        torch.zeros(1, device=device)
        import octavo.runners.cuda.runner  # noqa: F401


def _hash_compiler() -> None:
    """What Triton finds compiled kernels by: a hash of all of itself, which the first kernel would wait for."""
    with suppress(Exception):
        from triton.runtime.cache import triton_key

        triton_key()


def _declines_layer(layer: object) -> str | None:
    mixer, ffn = getattr(layer, "mixer", None), getattr(layer, "ffn", None)
    if not isinstance(mixer, Attention):
        return f"it has no kernels for {type(mixer).__name__}"
    if not isinstance(ffn, DenseMLP):
        return f"it has no kernels for {type(ffn).__name__}"
    if getattr(layer, "parallel", False):
        return "it has no parallel blocks"
    if mixer.head_dim > _MOST_HEAD_DIM:
        return f"heads of {mixer.head_dim} dims: it takes up to {_MOST_HEAD_DIM}"
    if mixer.heads > _MOST_GROUP * mixer.kv_heads:
        return f"{mixer.heads // mixer.kv_heads} heads share a key: it takes up to {_MOST_GROUP}"
    if mixer.qk_norm is not None and (mixer.qk_norm.kind != "rms" or mixer.qk_norm.bias):
        return f"its norms of queries and keys are rms without bias, not {mixer.qk_norm.kind}"
    return None


def _declines_card(device: str) -> str | None:
    index = int(device.partition(":")[2] or 0)
    found = read_cuda_driver(-1, os.environ)
    if isinstance(found, Unusable):
        return found.why
    card = found[index]
    if card.compute_capability < _LEAST_CAPABILITY:
        major, minor = card.compute_capability
        return f"{card.name} has compute capability {major}.{minor}, its kernels need 8.0"
    return None
