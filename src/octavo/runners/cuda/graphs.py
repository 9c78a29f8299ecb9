"""Launches as CUDA graphs: each is captured the second time it comes up, and replayed from then on.

The first time it runs eagerly: that compiles its kernels, and nobody waits for a capture before the first token.
Counts what happened, with Triton's own hook for compilations. The only place that says CUDAGraph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import triton

from octavo.runners.base import Counters


class Graphs:
    """Graphs by a key that says what is launched, on which buffers. `capturing` False: all of it runs eagerly."""

    def __init__(self, *, capturing: bool) -> None:
        self._capturing = capturing
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        """None: launched once."""
        self._pool: Any = None
        self._captures = 0
        self._eager = 0
        self._compilations = CompilationCount()

    def run(self, key: Hashable, launch: Callable[[], None]) -> None:
        """Launch it, or replay what it launched before: it has to be the same each time."""
        if key not in self._graphs or not self._capturing:
            self._eager += 1
            launch()
            self._graphs[key] = None
            return
        graph = self._graphs[key]
        if graph is None:
            graph = self._graphs[key] = self._capture(launch)
        graph.replay()

    def count_eager(self) -> None:
        """Work that is never captured: a prefill chunk."""
        self._eager += 1

    def counters(self) -> Counters:
        graphs = sum(graph is not None for graph in self._graphs.values())
        return Counters(graphs, self._captures, self._compilations.count, self._eager)

    def close(self) -> None:
        self._graphs.clear()
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
