"""The Runner contract on a CUDA device: slots, page tables and handles around decode graphs and prefill chunks.

Everything is queued on one stream; a handle waits for an event behind its own work. Decode chunks of a batch go
through one graph together, prefill chunks one after the other. Shape letters: B sequences, T tokens,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from octavo.errors import ClosedError, IncompatibleModelError, NotEnoughMemoryError
from octavo.models.spec import KV_PAGE_TOKENS, ModelSpec
from octavo.runners.base import (
    Adapter,
    Batch,
    Chunk,
    Counters,
    ForwardResult,
    RunnerConfig,
    RunnerInfo,
    Sampled,
    SampleResult,
    SlotState,
)
from octavo.runners.cuda.batch_decode import Step, step_kind
from octavo.runners.cuda.chunk import ChunkModel
from octavo.runners.cuda.decode import Card
from octavo.runners.cuda.decode_attention import Sequences
from octavo.runners.cuda.device_model import DeviceModel, load_model
from octavo.runners.cuda.graphs import StepGraphs
from octavo.runners.cuda.kv_cache import LayerCache, make_cache
from octavo.runners.cuda.limits import TARGET_ROWS, batch_buckets
from octavo.runners.cuda.pending import Pending
from octavo.runners.cuda.sampling import (
    LogprobRows,
    SlotLaw,
    logprobs_of,
    sample_row,
    slot_law,
    unpack_mask,
)
from octavo.types import TokenLogprob

if TYPE_CHECKING:
    from octavo.weights import WeightStore


@dataclass(slots=True)
class _Slot:
    law: SlotLaw
    position: int = -1
    """Of the last row fed, as the device has it; -1: unknown."""
    table_sources: list[tuple[int, ...]] = field(default_factory=list)
    """The page tables the device holds."""
    logits: torch.Tensor | None = None
    """fp32 [V], until it is sampled from."""


class CudaRunner:
    def __init__(self, spec: ModelSpec, weights: WeightStore, config: RunnerConfig) -> None:
        """Raises NotEnoughMemoryError where the device has no room for weights, KV pages and buffers."""
        self._spec = spec
        self._config = config
        self._device = torch.device(config.device)
        self._on_card = self._device.type == "cuda"
        self._slots: dict[int, _Slot] = {}
        self._decoded: tuple[int, ...] = ()
        self._closed = False
        try:
            with self._on_device():
                self._build(spec, weights, config)
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(weights.nbytes) from error

    def _build(self, spec: ModelSpec, weights: WeightStore, config: RunnerConfig) -> None:
        device = self._device
        self._card = _card(device)
        self._model: DeviceModel | None = load_model(spec, weights, config.context_tokens, device)
        # One page more in each group: rows that fill up a batch write there.
        self._caches: tuple[LayerCache, ...] = make_cache(
            spec, [pages + 1 for pages in config.kv_pages], getattr(torch, config.kv_dtype), device
        )
        self._spare_slot = config.max_slots
        pages = -(-config.context_tokens // KV_PAGE_TOKENS)
        self._positions = torch.zeros(config.max_slots + 1, dtype=torch.int32, device=device)
        self._last_tokens = torch.zeros(config.max_slots + 1, dtype=torch.int32, device=device)
        self._tables = tuple(
            torch.full((config.max_slots + 1, pages), count, dtype=torch.int32, device=device)
            for count in config.kv_pages
        )
        self._logits = torch.empty((config.max_slots, spec.vocab_size), device=device)
        self._chunks: ChunkModel | None = ChunkModel(
            self._model, self._caches, getattr(torch, config.compute_dtype)
        )
        self._graphs = StepGraphs(self._make_step, capturing=self._on_card)

    def _make_step(self, count: int) -> Step:
        slots = torch.full((count,), self._spare_slot, dtype=torch.int32, device=self._device)
        assert self._model is not None
        return step_kind(count)(
            self._model,
            self._caches,
            Sequences(slots, self._positions, self._tables, self._spare_slot),
            self._last_tokens,
            context_tokens=self._config.context_tokens,
            compute_dtype=getattr(torch, self._config.compute_dtype),
            card=self._card,
        )

    @property
    def info(self) -> RunnerInfo:
        return RunnerInfo(
            name="cuda",
            device=f"{self._config.device} ({self._card.name})",
            layout="cuda-b64-1",
            compute_dtype=self._config.compute_dtype,
            kv_dtype=self._config.kv_dtype,
            max_slots=self._config.max_slots,
            kv_pages=self._config.kv_pages,
            kernels={
                "decode, one sequence": "dp4a on 16-bit fixed-point activations",
                "decode, batches": "int8 tensor cores on 16-bit fixed-point activations; "
                f"{self._config.compute_dtype} where weights are not int8",
                "prefill": f"dequantized blocks, {self._config.compute_dtype} products of the library",
            },
            batch_invariant=False,
            chunk_invariant=False,
        )

    def open_slot(self, slot: int, state: SlotState) -> None:
        assert 0 <= slot < self._config.max_slots, f"slot {slot} is out of range"
        assert slot not in self._slots, f"slot {slot} is taken"
        assert state.adapter is None, "adapters are not supported"
        with self._on_device():
            law = slot_law(state, self._spec.vocab_size, self._device)
            self._last_tokens[slot] = state.token_ids[-1]
        self._slots[slot] = _Slot(law, table_sources=[()] * len(self._tables))

    def close_slot(self, slot: int) -> None:
        del self._slots[slot]

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Pending[ForwardResult]:
        if self._closed or self._chunks is None:
            raise ClosedError("the runner is closed", remedy="Load the model again.")
        with self._on_device():
            return self._forward(self._chunks, batch)

    def logits(self, slot: int) -> np.ndarray:
        logits = self._slots[slot].logits
        assert logits is not None, f"slot {slot} has no logits"
        return logits.cpu().numpy().copy()

    @torch.inference_mode()
    def sample(
        self,
        batch: Batch,
        masks: Mapping[int, np.ndarray] | None = None,
        logits: Mapping[int, np.ndarray] | None = None,
    ) -> Pending[SampleResult]:
        with self._on_device():
            return self._sample(batch, masks or {}, logits or {})

    def load_adapter(self, name: str, adapter: Adapter) -> None:
        raise IncompatibleModelError("the CUDA runner takes no adapters yet", remedy="Do without it.")

    def drop_adapter(self, name: str) -> None:
        raise AssertionError(f"there is no adapter {name!r}")

    def memory(self) -> Mapping[str, int]:
        if self._closed or self._model is None or self._chunks is None:
            return {"weights": 0, "kv": 0, "activations": 0}
        kv = sum(cache.keys.nbytes + cache.values.nbytes for cache in self._caches)
        buffers = self._graphs.nbytes + self._chunks.nbytes + self._logits.nbytes
        return {"weights": self._model.nbytes, "kv": kv, "activations": buffers}

    def counters(self) -> Counters:
        return self._graphs.counters()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._on_card:
            torch.cuda.synchronize(self._device)
        self._slots.clear()
        self._graphs.close()
        self._model = self._chunks = None
        self._caches = self._tables = ()
        del self._logits, self._positions, self._last_tokens
        if self._on_card:
            torch.cuda.empty_cache()

    # --- one step ----------------------------------------------------------------------------------

    def _on_device(self) -> AbstractContextManager[Any]:
        """Kernels are launched on the thread's current device."""
        return torch.cuda.device(self._device) if self._on_card else nullcontext()

    def _forward(self, model: ChunkModel, batch: Batch) -> Pending[ForwardResult]:
        for chunk in batch.chunks:
            assert not chunk.drafts, "drafts are not supported"
            self._update_tables(chunk)
        decoding = [chunk for chunk in batch.chunks if chunk.token_ids is None]
        self._decoded = self._decode(decoding) if decoding else ()
        prompts: dict[int, list[tuple[LogprobRows, list[int]]]] = {}
        for chunk in batch.chunks:
            if chunk.token_ids is not None:
                prompts[chunk.slot] = self._prefill(model, chunk)
        wanted = [None if chunk.targets is None else prompts[chunk.slot] for chunk in batch.chunks]

        def read() -> ForwardResult:
            return ForwardResult(tuple(None if rows is None else _read_rows(rows) for rows in wanted))

        return Pending(self._mark(), read)

    def _sample(
        self, batch: Batch, masks: Mapping[int, np.ndarray], logits: Mapping[int, np.ndarray]
    ) -> Pending[SampleResult]:
        sampled = [chunk for chunk in batch.chunks if chunk.sample]
        tokens: dict[int, torch.Tensor] = {}
        slots = self._decoded
        plain = all(s not in masks and s not in logits and self._slots[s].law.is_plain_greedy for s in slots)
        if slots and plain and all(chunk.sample for chunk in batch.chunks if chunk.slot in slots):
            count = self._bucket(len(slots))
            self._graphs.pick(count)
            picked = self._graphs.step(count).sampled
            tokens = {slot: picked[row] for row, slot in enumerate(slots)}
        rows: dict[int, LogprobRows] = {}
        for chunk in sampled:
            slot = chunk.slot
            if slot not in tokens:
                self._graphs.count_eager()
                tokens[slot] = self._sample_slot(chunk, masks.get(slot), logits.get(slot))
                self._last_tokens[slot] = tokens[slot].clamp_min(0)
                self._positions[slot] = chunk.start + chunk.tokens
            if self._slots[slot].law.sampling.logprobs is not None:
                rows[slot] = self._logprobs(slot, tokens[slot])
            self._slots[slot].position = chunk.start + chunk.tokens
            self._slots[slot].logits = None
        order = [chunk.slot for chunk in sampled]
        host = self._to_host([tokens[slot] for slot in order])

        def read() -> SampleResult:
            found = host.tolist()
            return SampleResult(
                tuple(
                    (Sampled(token, rows[slot].read([token])[0] if slot in rows and token >= 0 else None),)
                    for slot, token in zip(order, found, strict=True)
                )
            )

        return Pending(self._mark(), read)

    def _decode(self, chunks: Sequence[Chunk]) -> tuple[int, ...]:
        """Queue one decode graph; returns its slots, in the order of its rows."""
        slots = tuple(chunk.slot for chunk in chunks)
        count = self._bucket(len(slots))
        step = self._graphs.step(count)
        step.set_slots(slots)
        for chunk in chunks:
            state = self._slots[chunk.slot]
            if state.position != chunk.start:
                self._positions[chunk.slot] = chunk.start
                state.position = chunk.start
        self._graphs.forward(count)
        for row, chunk in enumerate(chunks):
            if chunk.sample:
                self._slots[chunk.slot].logits = step.logits[row]
        return slots

    def _prefill(self, model: ChunkModel, chunk: Chunk) -> list[tuple[LogprobRows, list[int]]]:
        """Queue a chunk; returns the logprobs of its targets, in row order, still on the device."""
        self._graphs.count_eager()
        assert chunk.token_ids is not None
        ids = torch.tensor(chunk.token_ids, dtype=torch.int32).to(self._device)
        tables = tuple(table[chunk.slot] for table in self._tables)
        hidden = model.forward(ids, chunk.start, tables)
        state = self._slots[chunk.slot]
        if chunk.sample:
            state.logits = self._logits[chunk.slot]
            model.logits(hidden[-1:], state.logits[None])
        last = chunk.start + chunk.tokens - 1
        self._positions[chunk.slot] = last
        state.position = last
        return [] if chunk.targets is None else self._target_rows(model, hidden, chunk)

    def _target_rows(
        self, model: ChunkModel, hidden: torch.Tensor, chunk: Chunk
    ) -> list[tuple[LogprobRows, list[int]]]:
        assert chunk.targets is not None
        found = []
        for first in range(0, chunk.tokens, TARGET_ROWS):
            targets = chunk.targets[first : first + TARGET_ROWS]
            logits = hidden.new_empty((len(targets), self._spec.vocab_size))
            model.logits(hidden[first : first + TARGET_ROWS], logits)
            tokens = torch.tensor(targets, dtype=torch.int64).to(self._device)
            found.append((logprobs_of(logits, tokens, chunk.top_logprobs), list(targets)))
        return found

    def _sample_slot(
        self, chunk: Chunk, mask: np.ndarray | None, replaced: np.ndarray | None
    ) -> torch.Tensor:
        state = self._slots[chunk.slot]
        logits = state.logits if replaced is None else torch.from_numpy(replaced).to(self._device)
        assert logits is not None
        allowed = None if mask is None else unpack_mask(mask, self._spec.vocab_size, self._device)
        return sample_row(logits, state.law, chunk.start + chunk.tokens, allowed)

    def _logprobs(self, slot: int, token: torch.Tensor) -> LogprobRows:
        state = self._slots[slot]
        assert state.logits is not None
        assert state.law.sampling.logprobs is not None
        return logprobs_of(state.logits[None], token.long()[None], state.law.sampling.logprobs)

    def _update_tables(self, chunk: Chunk) -> None:
        state = self._slots[chunk.slot]
        assert chunk.start + chunk.tokens <= self._config.context_tokens
        for group, table in enumerate(chunk.page_tables):
            if table == state.table_sources[group]:
                continue
            assert max(table) < self._config.kv_pages[group]
            made = torch.tensor(table, dtype=torch.int32)
            self._tables[group][chunk.slot, : len(table)].copy_(self._pinned(made), non_blocking=True)
            state.table_sources[group] = table

    def _bucket(self, count: int) -> int:
        return next(size for size in batch_buckets(self._config.max_slots) if size >= count)

    def _to_host(self, tokens: Sequence[torch.Tensor]) -> torch.Tensor:
        """int32 [rows], filled when the event recorded behind it is reached."""
        gathered = torch.stack([token.to(torch.int32) for token in tokens]) if tokens else torch.zeros(0)
        host = torch.empty(gathered.shape, dtype=torch.int32, pin_memory=self._on_card)
        return host.copy_(gathered, non_blocking=True)

    def _pinned(self, values: torch.Tensor) -> torch.Tensor:
        # torch keeps a pinned block until the stream is past the copy that reads it.
        return values.pin_memory() if self._on_card else values

    def _mark(self) -> torch.cuda.Event | None:
        if not self._on_card:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _out_of_memory(self, weights_bytes: int) -> NotEnoughMemoryError:
        free, _ = torch.cuda.mem_get_info(self._device)
        return NotEnoughMemoryError(
            f"{self._config.device} has {free:,} bytes free, not enough for weights of {weights_bytes:,} bytes, "
            f"KV pages and buffers",
            remedy="Try a smaller --context, fewer --max-sequences, or --quant int8; close what else uses the card.",
            needed_bytes=weights_bytes,
            available_bytes=free,
        )


def _card(device: torch.device) -> Card:
    if device.type != "cuda":  # the interpreter
        return Card("none", 4, False, 0)
    properties = torch.cuda.get_device_properties(device)
    return Card(
        properties.name, properties.multi_processor_count, properties.major >= 9, properties.L2_cache_size
    )


def _read_rows(rows: Sequence[tuple[LogprobRows, list[int]]]) -> tuple[TokenLogprob, ...]:
    read = [logprob for found, targets in rows for logprob in found.read(targets)]
    return tuple(logprob for logprob in read if logprob.token_id >= 0)
