"""Decode steps as CUDA graphs, one for each batch size, captured when a size comes up for the second time.

The first step of a size runs eagerly: it compiles the kernels, and nobody waits for a capture before the first
token. Counts what happened, with Triton's own hook for compilations. The only place that says CUDAGraph.
Shape letters: B sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton

from octavo.runners.base import Counters
from octavo.runners.cuda.batch_decode import Step


@dataclass(slots=True)
class _Size:
    step: Step
    forward: torch.cuda.CUDAGraph | None = None
    pick: torch.cuda.CUDAGraph | None = None
    forwards: int = 0
    picks: int = 0


class StepGraphs:
    """`capturing` False (no CUDA): every step runs eagerly."""

    def __init__(self, make_step: Callable[[int], Step], *, capturing: bool) -> None:
        self._make_step = make_step
        self._capturing = capturing
        self._sizes: dict[int, _Size] = {}
        self._pool: Any = None
        self._captures = 0
        self._eager = 0
        self._compilations = CompilationCount()

    def step(self, count: int) -> Step:
        """The buffers of a batch of `count` rows."""
        if count not in self._sizes:
            self._sizes[count] = _Size(self._make_step(count))
        return self._sizes[count].step

    def forward(self, count: int) -> None:
        size = self._sizes[count]
        size.forwards += 1
        if size.forwards == 1 or not self._capturing:
            self._eager += 1
            size.step.forward()
            return
        if size.forward is None:
            size.forward = self._capture(size.step.forward)
        size.forward.replay()

    def pick(self, count: int) -> None:
        size = self._sizes[count]
        size.picks += 1
        if size.picks == 1 or not self._capturing:
            size.step.pick()
            return
        if size.pick is None:
            size.pick = self._capture(size.step.pick)
        size.pick.replay()

    def count_eager(self, steps: int = 1) -> None:
        """Work outside of any graph: prefill chunks, sampling that `pick` does not do."""
        self._eager += steps

    @property
    def nbytes(self) -> int:
        return sum(size.step.nbytes for size in self._sizes.values())

    def counters(self) -> Counters:
        graphs = sum((size.forward is not None) + (size.pick is not None) for size in self._sizes.values())
        return Counters(graphs, self._captures, self._compilations.count, self._eager)

    def close(self) -> None:
        self._sizes.clear()
        self._pool = None
        self._compilations.stop()

    def _capture(self, launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # Another thread of the process may allocate meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            launch()
        self._captures += 1
        return graph


class CompilationCount:
    """Kernels that Triton compiled or loaded for a call it had not seen, in this process, while it runs."""

    def __init__(self) -> None:
        self.count = 0
        self._before = triton.knobs.runtime.jit_post_compile_hook
        triton.knobs.runtime.jit_post_compile_hook = self._hook

    def stop(self) -> None:
        # Hooks are a chain: only the last one may be taken off, another stays and counts in vain.
        if triton.knobs.runtime.jit_post_compile_hook == self._hook:
            triton.knobs.runtime.jit_post_compile_hook = self._before

    def _hook(self, **compiled: Any) -> bool | None:
        self.count += 1
        return None if self._before is None else self._before(**compiled)
