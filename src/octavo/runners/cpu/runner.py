"""The Runner contract over the library: slots, batches and results as structs, one call a step.

Synchronous: a handle is done when it is returned. Tokens and logprobs of a sequence are bit-equal alone, in any
batch, however its prompt is cut, and with any number of threads. Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from octavo.errors import ClosedError, NotEnoughMemoryError
from octavo.models.spec import KV_PAGE_TOKENS, ModelSpec
from octavo.runners.adapters import check_adapter, linears_of
from octavo.runners.base import (
    Adapter,
    Batch,
    Chunk,
    Counters,
    Done,
    ForwardResult,
    RunnerConfig,
    RunnerInfo,
    SampleResult,
    SlotState,
)
from octavo.runners.cpu import library
from octavo.runners.cpu.adapter import NativeAdapter
from octavo.runners.cpu.huge_pages import in_huge_pages
from octavo.runners.cpu.kernel_names import kernel_names
from octavo.runners.cpu.library import ISA_NAMES, IsaName
from octavo.runners.cpu.limits import activation_bytes, kv_bytes
from octavo.runners.cpu.model import NativeModel, build_model
from octavo.runners.cpu.sampling import WantedLogprobs, WantedTokens, sampling_struct
from octavo.runners.freed_memory import return_freed_memory
from octavo.settings import ActivationsName
from octavo.types import TokenLogprob

if TYPE_CHECKING:
    from octavo.weights import WeightStore


@dataclass(slots=True)
class _Slot:
    logprobs: int | None
    adapter: NativeAdapter | None
    """Kept alive: the library reads it in place."""
    table_sources: list[tuple[int, ...]]
    """The page tables `tables` was made from: a table that is the same object needs no new array."""
    tables: list[np.ndarray]


class CpuRunner:
    def __init__(
        self,
        spec: ModelSpec,
        weights: WeightStore,
        config: RunnerConfig,
        *,
        isa: IsaName,
        threads: int,
        activations: ActivationsName = "int16",
    ) -> None:
        """Raises NotEnoughMemoryError where KV pages or activations do not fit."""
        self._library = library.native()
        self._spec = spec
        self._config = config
        self._isa = isa
        self._threads = threads
        number = ISA_NAMES.index(isa)
        self._lanes = int(self._library.octavo_isa_lanes(number))
        bundles = in_huge_pages(weights)
        self._model: NativeModel | None = build_model(
            spec,
            bundles,
            config,
            isa=number,
            lanes=self._lanes,
            threads=threads,
            activations=activations,
        )
        self._kernels = kernel_names(weights, isa, activations)
        self._linears = linears_of(weights)
        self._adapters: dict[str, NativeAdapter] = {}
        self._slots: dict[int, _Slot] = {}
        self._steps = 0
        self._handle: int | None = self._library.octavo_open(ctypes.byref(self._model.struct))
        if not self._handle:
            self._handle = None
            raise self._out_of_memory()

    @property
    def info(self) -> RunnerInfo:
        return RunnerInfo(
            name="cpu",
            device=f"cpu ({self._isa}, {self._threads} thread{'s' if self._threads > 1 else ''})",
            layout=f"cpu-r{self._lanes}-1",
            compute_dtype="float32",
            kv_dtype="float16",
            max_slots=self._config.max_slots,
            kv_pages=self._config.kv_pages,
            kernels=self._kernels,
            batch_invariant=True,
            chunk_invariant=True,
        )

    def open_slot(self, slot: int, state: SlotState) -> None:
        assert 0 <= slot < self._config.max_slots, f"slot {slot} is out of range"
        assert slot not in self._slots, f"slot {slot} is taken"
        adapter = None if state.adapter is None else self._adapters[state.adapter]
        ids = self._ids(state.token_ids)
        sampling, kept = sampling_struct(state.sampling, self._spec.vocab_size)
        self._check(
            self._library.octavo_open_slot(
                self._open_handle(),
                slot,
                ctypes.byref(sampling),
                ids.ctypes.data,
                len(ids),
                state.prompt_tokens,
                None if adapter is None else ctypes.byref(adapter.struct),
            )
        )
        del kept  # the library has copied it
        groups = len(self._config.kv_pages)
        empty = np.zeros(0, np.int32)
        self._slots[slot] = _Slot(state.sampling.logprobs, adapter, [()] * groups, [empty] * groups)

    def close_slot(self, slot: int) -> None:
        del self._slots[slot]
        self._library.octavo_close_slot(self._open_handle(), slot)

    def forward(self, batch: Batch) -> Done[ForwardResult]:
        structs = (library.ChunkStruct * len(batch.chunks))()
        kept = [self._fill(struct, chunk) for struct, chunk in zip(structs, batch.chunks, strict=True)]
        self._check(self._library.octavo_forward(self._open_handle(), structs, len(structs)))
        self._steps += 1
        return Done(
            ForwardResult(tuple(_prompt_logprobs(c, k) for c, k in zip(batch.chunks, kept, strict=True)))
        )

    def sample(
        self,
        batch: Batch,
        masks: Mapping[int, np.ndarray] | None = None,
        logits: Mapping[int, np.ndarray] | None = None,
    ) -> Done[SampleResult]:
        chunks = [chunk for chunk in batch.chunks if chunk.sample]
        structs = (library.SampleStruct * len(chunks))()
        wanted = [
            WantedTokens(
                chunk.slot,
                self._spec.vocab_size,
                draft_ids=_draft_ids(chunk),
                top_logprobs=self._slots[chunk.slot].logprobs,
                mask=(masks or {}).get(chunk.slot),
                logits=(logits or {}).get(chunk.slot),
            )
            for chunk in chunks
        ]
        for struct, tokens in zip(structs, wanted, strict=True):
            tokens.fill(struct)
        self._check(self._library.octavo_sample(self._open_handle(), structs, len(structs)))
        return Done(SampleResult(tuple(w.read(struct) for struct, w in zip(structs, wanted, strict=True))))

    def logits(self, slot: int) -> np.ndarray:
        """The fp32 logits [V] the last `forward` kept for a slot, in an array of their own."""
        pointer = self._library.octavo_logits(self._open_handle(), slot)
        return np.ctypeslib.as_array(pointer, (self._spec.vocab_size,)).copy()

    def load_adapter(self, name: str, adapter: Adapter) -> None:
        check_adapter(name, adapter, self._linears)
        self._adapters[name] = NativeAdapter(adapter, len(self._spec.layers))

    def drop_adapter(self, name: str) -> None:
        dropped = self._adapters.pop(name)
        assert all(slot.adapter is not dropped for slot in self._slots.values()), f"{name} is in use"

    def memory(self) -> Mapping[str, int]:
        if self._handle is None or self._model is None:
            return {"weights": 0, "kv": 0, "activations": 0}
        kv, activations = ctypes.c_int64(), ctypes.c_int64()
        self._library.octavo_memory(self._handle, ctypes.byref(kv), ctypes.byref(activations))
        held = {"weights": self._model.weight_bytes, "kv": kv.value, "activations": activations.value}
        if self._adapters:
            held["adapters"] = sum(adapter.nbytes for adapter in self._adapters.values())
        return held

    def counters(self) -> Counters:
        return Counters()

    def close(self) -> None:
        handle, self._handle = self._handle, None
        self._slots.clear()
        self._adapters.clear()
        if handle is not None:
            self._library.octavo_close(handle)
            return_freed_memory()
        self._model = None

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()

    def _fill(self, struct: library.ChunkStruct, chunk: Chunk) -> _Kept:
        slot, tokens, end = self._slots[chunk.slot], chunk.tokens, chunk.start + chunk.tokens
        assert chunk.start >= 0
        assert tokens > 0
        assert end <= self._config.context_tokens
        kept = _Kept()
        if chunk.token_ids is not None:
            kept.ids = self._ids(chunk.token_ids)
            struct.token_ids = kept.ids.ctypes.data
        self._update_tables(slot, chunk)
        pages_needed = -(-end // KV_PAGE_TOKENS)
        assert all(len(table) >= pages_needed for table in slot.tables)
        kept.tables = (ctypes.c_void_p * len(slot.tables))(*(table.ctypes.data for table in slot.tables))
        struct.page_tables = ctypes.cast(kept.tables, type(struct.page_tables))
        if chunk.targets is not None:
            kept.targets = np.array(chunk.targets, np.int32)
            assert kept.targets.shape == (tokens,)
            assert kept.targets.max() < self._spec.vocab_size
            kept.wanted = WantedLogprobs(tokens, min(chunk.top_logprobs, self._spec.vocab_size))
            struct.targets = kept.targets.ctypes.data
            struct.prompt = kept.wanted.struct
        struct.slot, struct.start, struct.tokens = chunk.slot, chunk.start, tokens
        struct.sample, struct.drafts = chunk.sample, len(_draft_ids(chunk))
        return kept

    def _update_tables(self, slot: _Slot, chunk: Chunk) -> None:
        for group, table in enumerate(chunk.page_tables):
            if table is slot.table_sources[group]:
                continue
            made = np.array(table, np.int32)
            assert made.size == 0 or made.max() < self._config.kv_pages[group]
            slot.table_sources[group], slot.tables[group] = table, made

    def _ids(self, token_ids: object) -> np.ndarray:
        ids = np.array(token_ids, np.int32)
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < self._spec.vocab_size)
        return ids

    def _open_handle(self) -> int:
        if self._handle is None:
            raise ClosedError("the runner is closed", remedy="Load the model again.")
        return self._handle

    def _check(self, status: int) -> None:
        if status < 0:
            raise self._out_of_memory()

    def _out_of_memory(self) -> NotEnoughMemoryError:
        import psutil

        kv, activations = (
            kv_bytes(self._spec, self._config),
            activation_bytes(self._spec, self._config, self._threads),
        )
        needed = kv + activations
        return NotEnoughMemoryError(
            f"the system gave no memory for {kv:,} bytes of keys and values and {activations:,} of activations",
            remedy="Try a smaller --context, or fewer --max-sequences.",
            needed_bytes=needed,
            available_bytes=psutil.virtual_memory().available,
        )


class _Kept:
    """What a chunk's struct points to, until the call returns."""

    ids: np.ndarray | None = None
    tables: ctypes.Array[ctypes.c_void_p] | None = None
    targets: np.ndarray | None = None
    wanted: WantedLogprobs | None = None


def _draft_ids(chunk: Chunk) -> tuple[int, ...]:
    if chunk.drafts == 0:
        return ()
    # The token before a draft is known: only what comes after it is a guess.
    assert chunk.token_ids is not None
    assert 0 < chunk.drafts < len(chunk.token_ids)
    return chunk.token_ids[-chunk.drafts :]


def _prompt_logprobs(chunk: Chunk, kept: _Kept) -> tuple[TokenLogprob, ...] | None:
    if chunk.targets is None or kept.wanted is None:
        return None
    wanted = kept.wanted
    return tuple(wanted.read(row, target) for row, target in enumerate(chunk.targets) if target >= 0)
