"""The Runner contract on a CUDA device: slots, page tables and handles around decode graphs and prefill chunks.

Everything is queued on one stream; a handle waits for an event behind its own work. Decode chunks of a batch go
through one graph together, prefill chunks one after the other, and all rows that sample through one graph again:
`pick` where all are decode rows and plainly greedy, else the whole law. Deterministic, every step has the same number
of rows and the same kernels, and a prompt's tokens are rows as well (`prompt_rows`). Shape letters: B sequences,
T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from octavo.errors import ClosedError, IncompatibleModelError
from octavo.models.spec import KV_PAGE_TOKENS, ModelSpec
from octavo.runners.adapters import check_adapter, linears_of
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
from octavo.runners.cuda.batch_decode import Step, make_step
from octavo.runners.cuda.card_memory import no_room_to_load, no_room_to_run
from octavo.runners.cuda.chunk import ChunkModel
from octavo.runners.cuda.decode import card_of
from octavo.runners.cuda.decode_attention import Sequences
from octavo.runners.cuda.device_model import DeviceModel, load_model
from octavo.runners.cuda.graphs import Graphs
from octavo.runners.cuda.kv_cache import LayerCache, make_cache
from octavo.runners.cuda.laws import SlotLaws, is_plain_greedy
from octavo.runners.cuda.limits import INT8_BLOCK, TARGET_ROWS, batch_buckets, deterministic_rows
from octavo.runners.cuda.logprobs import MOST_TOP, LogprobBuffers, logprobs, read_logprobs
from octavo.runners.cuda.low_rank import Adapters
from octavo.runners.cuda.pending import Pending
from octavo.runners.cuda.pick import TOLD_STEPS
from octavo.runners.cuda.prompt_rows import PromptRows
from octavo.runners.cuda.sampling import Row, SampleStep
from octavo.settings import ActivationsName
from octavo.types import Sampling, TokenLogprob

if TYPE_CHECKING:
    from octavo.weights import WeightStore


@dataclass(frozen=True, slots=True)
class _TargetRows:
    """Logprobs of prompt rows, on their way to the host."""

    found: torch.Tensor
    targets: list[int]
    top: int

    def read(self) -> list[TokenLogprob]:
        read = read_logprobs(self.found, self.targets, [self.top] * len(self.targets))
        return [logprob for logprob in read if logprob.token_id >= 0]


@dataclass(slots=True)
class _Slot:
    sampling: Sampling
    position: int = -1
    """What the device holds: where the next row goes once a token was sampled, else where the last one fed went.
    -1: unknown."""
    table_sources: list[tuple[int, ...]] = field(default_factory=list)
    """The page tables the device holds."""
    logits: torch.Tensor | None = None
    """fp32 [V], until it is sampled from."""
    is_plain: bool = False
    """Sampled by `pick`: the argmax of its logits, with nothing to report beside it."""
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class _StepKey:
    """What decode steps differ in."""

    rows: int
    """A bucket's."""
    adapted: bool
    """Whether a row has an adapter: the others of the batch are then computed so, too."""


class CudaRunner:
    def __init__(
        self,
        spec: ModelSpec,
        weights: WeightStore,
        config: RunnerConfig,
        *,
        activations: ActivationsName = "int16",
    ) -> None:
        """Raises NotEnoughMemoryError where the device has no room for weights, KV pages and buffers."""
        self._spec = spec
        self._activations: ActivationsName = activations
        self._config = config
        self._device = torch.device(config.device)
        self._on_card = self._device.type == "cuda"
        self._slots: dict[int, _Slot] = {}
        self._decoded: tuple[int, ...] = ()
        self._closed = False
        free_bytes = self._free_bytes()
        self._linears = linears_of(weights)
        self._adapters: Adapters | None = None
        """None until the first one is loaded."""
        try:
            with self._on_device():
                self._build(spec, weights, config)
                return
        except torch.OutOfMemoryError:
            pass  # raised below, where no traceback holds tensors
        vars(self).pop("_model", None)
        vars(self).pop("_caches", None)
        torch.cuda.empty_cache()
        raise no_room_to_load(spec, config, weights.nbytes, free_bytes)

    def _build(self, spec: ModelSpec, weights: WeightStore, config: RunnerConfig) -> None:
        device = self._device
        self._card = card_of(device)
        self._model: DeviceModel | None = load_model(spec, weights, config.context_tokens, device)
        if self._activations == "int8" and not self._model.has_int8_layers:
            raise IncompatibleModelError(
                "no layer of this model has int8 weights, which int8 activations are for",
                remedy="Leave --activations out, or load with --quant int8 or llm-int8.",
            )
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
        self._told = torch.zeros(
            (config.max_slots + 1, TOLD_STEPS), dtype=torch.int32, pin_memory=self._on_card
        )
        self._logits = torch.empty((config.max_slots, spec.vocab_size), device=device)
        self._laws = SlotLaws.empty(config.max_slots, spec.vocab_size, device)
        self._chunks: ChunkModel | PromptRows | None = self._make_chunks(self._model)
        self._graphs = Graphs(capturing=self._on_card)
        self._decode_steps: dict[_StepKey, Step] = {}
        self._sample_steps: dict[int, SampleStep] = {}

    def _make_chunks(self, model: DeviceModel) -> ChunkModel | PromptRows:
        config, dtype = self._config, getattr(torch, self._config.compute_dtype)
        if config.deterministic:
            return PromptRows(
                model,
                self._caches,
                config.kv_pages,
                deterministic_rows(config.max_slots),
                pages=self._tables[0].shape[1],
                context_tokens=config.context_tokens,
                compute_dtype=dtype,
                card=self._card,
            )
        descriptors = self._card.pdl
        return ChunkModel(model, self._caches, dtype, activations=self._activations, descriptors=descriptors)

    def _step_key(self, slots: Sequence[int]) -> _StepKey:
        adapted = any(self._slots[slot].adapter is not None for slot in slots)
        return _StepKey(self._bucket(len(slots)), adapted)

    def _decode_step(self, key: _StepKey) -> Step:
        """The buffers of a batch."""
        if key not in self._decode_steps:
            self._decode_steps[key] = self._make_decode_step(key)
        return self._decode_steps[key]

    def _sample_step(self, count: int) -> SampleStep:
        if count not in self._sample_steps:
            self._sample_steps[count] = SampleStep(
                self._laws,
                self._last_tokens,
                self._positions,
                self._told,
                count,
                multiprocessors=self._card.multiprocessors,
            )
        return self._sample_steps[count]

    def _make_decode_step(self, key: _StepKey) -> Step:
        slots = torch.full((key.rows,), self._spare_slot, dtype=torch.int32, device=self._device)
        assert self._model is not None
        return make_step(
            self._model,
            self._caches,
            Sequences(slots, self._positions, self._tables, self._spare_slot),
            self._last_tokens,
            context_tokens=self._config.context_tokens,
            compute_dtype=getattr(torch, self._config.compute_dtype),
            card=self._card,
            adapters=self._adapters if key.adapted else None,
            appends_first=self._config.deterministic,
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
            kernels=self._kernels() | {"sampling": "all rows in one graph, cuts by narrowing a bracket"},
            batch_invariant=self._config.deterministic,
            chunk_invariant=self._config.deterministic,
            takes_drafts=False,
        )

    def _kernels(self) -> dict[str, str]:
        dtype = self._config.compute_dtype
        batches = f"int8 tensor cores on 16-bit fixed-point activations; {dtype} where weights are not int8"
        if self._config.deterministic:
            rows = deterministic_rows(self._config.max_slots)
            return {"decode and prefill": f"steps of {rows} rows: {batches}"}
        prefill = f"dequantized blocks, {dtype} products of the library"
        if self._activations == "int8":
            prefill = (
                f"int8 activations in blocks of {INT8_BLOCK} columns; {prefill} where weights are not int8"
            )
        one = "dp4a on 16-bit fixed-point activations"
        return {"decode, one sequence": one, "decode, batches": batches, "prefill": prefill}

    def open_slot(self, slot: int, state: SlotState) -> None:
        assert 0 <= slot < self._config.max_slots, f"slot {slot} is out of range"
        assert slot not in self._slots, f"slot {slot} is taken"
        assert (state.sampling.logprobs or 0) <= MOST_TOP, f"more than {MOST_TOP} alternatives"
        with self._on_device():
            if self._adapters is not None:
                self._adapters.bind(slot, state.adapter)
            self._laws.open(slot, state)
            self._last_tokens[slot] = state.token_ids[-1]
        plain = is_plain_greedy(state.sampling) and state.sampling.logprobs is None
        sources: list[tuple[int, ...]] = [()] * len(self._tables)
        self._slots[slot] = _Slot(
            state.sampling, table_sources=sources, is_plain=plain, adapter=state.adapter
        )

    def close_slot(self, slot: int) -> None:
        del self._slots[slot]

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Pending[ForwardResult]:
        if self._closed or self._chunks is None:
            raise ClosedError("the runner is closed", remedy="Load the model again.")
        try:
            with self._on_device():
                return self._forward(self._chunks, batch)
        except torch.OutOfMemoryError as error:
            raise no_room_to_run(self._spec, self._config, self._free_bytes()) from error

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
        try:
            with self._on_device():
                return self._sample(batch, masks or {}, logits or {})
        except torch.OutOfMemoryError as error:
            raise no_room_to_run(self._spec, self._config, self._free_bytes()) from error

    def load_adapter(self, name: str, adapter: Adapter) -> None:
        if self._config.deterministic:
            raise IncompatibleModelError(
                f"adapter {name!r} cannot be loaded: with --deterministic, rows with and without an adapter would "
                "have other arithmetic",
                remedy="Load the model without --deterministic, or with --runner cpu.",
            )
        check_adapter(name, adapter, self._linears)
        assert self._model is not None
        with self._on_device():
            if self._adapters is None:
                self._adapters = Adapters(self._model, self._config.max_slots + 1, self._device)
            self._adapters.load(name, adapter)

    def drop_adapter(self, name: str) -> None:
        assert all(slot.adapter != name for slot in self._slots.values()), f"adapter {name!r} is in use"
        assert self._adapters is not None, f"there is no adapter {name!r}"
        with self._on_device():
            self._adapters.drop(name)

    def memory(self) -> Mapping[str, int]:
        if self._closed or self._model is None or self._chunks is None:
            return {"weights": 0, "kv": 0, "activations": 0, "adapters": 0}
        kv = sum(cache.keys.nbytes + cache.values.nbytes for cache in self._caches)
        buffers = sum(step.nbytes for step in self._decode_steps.values()) + self._laws.nbytes
        buffers += sum(step.nbytes for step in self._sample_steps.values())
        buffers += self._chunks.nbytes + self._logits.nbytes
        adapters = 0 if self._adapters is None else self._adapters.nbytes
        return {"weights": self._model.nbytes, "kv": kv, "activations": buffers, "adapters": adapters}

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
        self._decode_steps.clear()
        self._sample_steps.clear()
        self._model = self._chunks = self._adapters = None
        self._caches = self._tables = ()
        del self._logits, self._positions, self._last_tokens, self._laws, self._told
        if self._on_card:
            torch.cuda.empty_cache()

    # --- one step ----------------------------------------------------------------------------------

    def _on_device(self) -> AbstractContextManager[Any]:
        """Kernels are launched on the thread's current device."""
        return torch.cuda.device(self._device) if self._on_card else nullcontext()

    def _forward(self, model: ChunkModel | PromptRows, batch: Batch) -> Pending[ForwardResult]:
        for chunk in batch.chunks:
            assert not chunk.drafts, "drafts are not supported"
            self._update_tables(chunk)
        decoding = [chunk for chunk in batch.chunks if chunk.token_ids is None]
        self._decoded = self._decode(decoding) if decoding else ()
        prompts: dict[int, list[_TargetRows]] = {}
        for chunk in batch.chunks:
            if chunk.token_ids is not None:
                prompts[chunk.slot] = self._prefill(model, chunk)
        wanted = [None if chunk.targets is None else prompts[chunk.slot] for chunk in batch.chunks]

        def read() -> ForwardResult:
            return ForwardResult(
                tuple(
                    None if rows is None else tuple(logprob for part in rows for logprob in part.read())
                    for rows in wanted
                )
            )

        return Pending(self._mark(), read)

    def _sample(
        self, batch: Batch, masks: Mapping[int, np.ndarray], logits: Mapping[int, np.ndarray]
    ) -> Pending[SampleResult]:
        chunks = [chunk for chunk in batch.chunks if chunk.sample]
        if not chunks:
            return Pending(self._mark(), lambda: SampleResult(()))
        slots = [chunk.slot for chunk in chunks]
        count = self._bucket(len(chunks))
        tops = [self._slots[slot].sampling.logprobs for slot in slots]
        found = None
        if not masks and not logits and self._is_plain(slots):
            key = self._step_key(slots)
            self._graphs.run(("pick", key), partial(self._decode_step(key).pick, self._told))
        else:
            law = self._sample_step(count)
            given = {slot: self._to_device(torch.from_numpy(row)) for slot, row in logits.items()}
            law.set_rows(self._rows(slots, given, masks), list(masks.values()))
            self._graphs.run(("law", count), law.launch)
            if any(top is not None for top in tops):
                self._graphs.run(("logprobs", count), law.launch_logprobs)
                found = self._to_host(law.found)
        for chunk in chunks:
            state = self._slots[chunk.slot]
            state.position = chunk.start + chunk.tokens
            state.logits = None
        told = self._told.numpy()
        places = [(chunk.start + chunk.tokens) % TOLD_STEPS for chunk in chunks]

        def read() -> SampleResult:
            tokens = told[slots, places].tolist()
            if found is None:
                return SampleResult(tuple([(Sampled(token, None),) for token in tokens]))
            scores = read_logprobs(found, tokens, [top or 0 for top in tops])
            return SampleResult(
                tuple(
                    (Sampled(token, None if token < 0 or top is None else score),)
                    for token, top, score in zip(tokens, tops, scores, strict=True)
                )
            )

        return Pending(self._mark(), read)

    def _is_plain(self, slots: Sequence[int]) -> bool:
        """Whether `pick` samples these: the rows just decoded, all plainly greedy, without logprobs."""
        return tuple(slots) == self._decoded and all(self._slots[slot].is_plain for slot in slots)

    def _rows(
        self, slots: Sequence[int], given: Mapping[int, torch.Tensor], masks: Mapping[int, np.ndarray]
    ) -> list[Row]:
        places = {slot: place for place, slot in enumerate(masks)}
        rows = []
        for slot in slots:
            state = self._slots[slot]
            assert state.logits is not None
            own, top = state.logits.data_ptr(), state.sampling.logprobs
            address = given[slot].data_ptr() if slot in given else own
            rows.append(Row(slot, address, own, places.get(slot, -1), -1 if top is None else top))
        return rows

    def _decode(self, chunks: Sequence[Chunk]) -> tuple[int, ...]:
        """Queue one decode graph; returns its slots, in the order of its rows."""
        slots = tuple(chunk.slot for chunk in chunks)
        key = self._step_key(slots)
        step = self._decode_step(key)
        step.set_slots(slots)
        for chunk in chunks:
            state = self._slots[chunk.slot]
            if state.position != chunk.start:
                self._positions[chunk.slot] = chunk.start
                state.position = chunk.start
        self._graphs.run(("forward", key), step.forward)
        for row, chunk in enumerate(chunks):
            if chunk.sample:
                self._slots[chunk.slot].logits = step.logits[row]
        return slots

    def _prefill(self, model: ChunkModel | PromptRows, chunk: Chunk) -> list[_TargetRows]:
        """Queue a chunk; returns the logprobs of its targets, in row order, still on the device."""
        assert chunk.token_ids is not None
        ids = self._to_device(torch.tensor(chunk.token_ids, dtype=torch.int32))
        tables = tuple(table[chunk.slot] for table in self._tables)
        if isinstance(model, PromptRows):
            found = self._prefill_rows(model, chunk, ids, tables)
        else:
            found = self._prefill_chunk(model, chunk, ids, tables)
        last = chunk.start + chunk.tokens - 1
        self._positions[chunk.slot] = last
        self._slots[chunk.slot].position = last
        return found

    def _prefill_chunk(
        self, model: ChunkModel, chunk: Chunk, ids: torch.Tensor, tables: tuple[torch.Tensor, ...]
    ) -> list[_TargetRows]:
        self._graphs.count_eager()
        state = self._slots[chunk.slot]
        model.addends = {} if self._adapters is None else self._adapters.of(state.adapter)
        hidden = model.forward(ids, chunk.start, tables)
        if chunk.sample:
            state.logits = self._logits[chunk.slot]
            model.logits(hidden[-1:], state.logits[None])
        if chunk.targets is None:
            return []
        found = []
        for first in range(0, chunk.tokens, TARGET_ROWS):
            rows = hidden[first : first + TARGET_ROWS]
            logits = hidden.new_empty((len(rows), self._spec.vocab_size))
            model.logits(rows, logits)
            found.append(self._target_rows(logits, chunk, first))
        return found

    def _prefill_rows(
        self, model: PromptRows, chunk: Chunk, ids: torch.Tensor, tables: tuple[torch.Tensor, ...]
    ) -> list[_TargetRows]:
        found = []
        for first in range(0, chunk.tokens, model.rows):
            part = ids[first : first + model.rows]
            model.set(part, chunk.start + first, tables)
            last = first + len(part) == chunk.tokens
            head = chunk.targets is not None or (chunk.sample and last)
            self._graphs.run(("prompt", head), partial(model.step.forward, head=head))
            logits = model.step.logits[: len(part)]
            if chunk.targets is not None:
                found.append(self._target_rows(logits, chunk, first))
            if chunk.sample and last:
                state = self._slots[chunk.slot]
                state.logits = self._logits[chunk.slot].copy_(logits[-1])
        return found

    def _target_rows(self, logits: torch.Tensor, chunk: Chunk, first: int) -> _TargetRows:
        """Of rows `first`.. of a chunk: `logits` fp32 [rows, V]."""
        assert chunk.targets is not None
        assert chunk.top_logprobs <= MOST_TOP, f"more than {MOST_TOP} alternatives"
        targets = list(chunk.targets[first : first + len(logits)])
        buffers = LogprobBuffers.empty(len(targets), self._spec.vocab_size, self._device)
        addresses = [row.data_ptr() for row in logits]
        logprobs(
            self._to_device(torch.tensor(addresses, dtype=torch.int64)),
            self._to_device(torch.tensor(targets, dtype=torch.int32)),
            torch.full((len(targets),), chunk.top_logprobs, dtype=torch.int32, device=self._device),
            self._spec.vocab_size,
            buffers,
        )
        return _TargetRows(self._to_host(buffers.found), targets, chunk.top_logprobs)

    def _update_tables(self, chunk: Chunk) -> None:
        state = self._slots[chunk.slot]
        assert chunk.start + chunk.tokens <= self._config.context_tokens
        for group, table in enumerate(chunk.page_tables):
            if table == state.table_sources[group]:
                continue
            assert max(table) < self._config.kv_pages[group]
            made = self._pinned(torch.tensor(table, dtype=torch.int32))
            self._tables[group][chunk.slot, : len(table)].copy_(made, non_blocking=True)
            state.table_sources[group] = table

    def _bucket(self, count: int) -> int:
        if self._config.deterministic:
            return deterministic_rows(self._config.max_slots)
        return next(size for size in batch_buckets(self._config.max_slots) if size >= count)

    def _to_host(self, values: torch.Tensor) -> torch.Tensor:
        """A copy that is filled when the event recorded behind it is reached."""
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=self._on_card)
        return host.copy_(values, non_blocking=True)

    def _to_device(self, values: torch.Tensor) -> torch.Tensor:
        return self._pinned(values).to(self._device, non_blocking=True)

    def _pinned(self, values: torch.Tensor) -> torch.Tensor:
        # torch keeps a pinned block until the stream is past the copy that reads it.
        return values.pin_memory() if self._on_card else values

    def _mark(self) -> torch.cuda.Event | None:
        if not self._on_card:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0] if self._on_card else 0
