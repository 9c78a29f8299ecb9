"""The Runner contract over `ReferenceModel`: slots, batches and handles.

Synchronous: a handle is done when it is returned. Every chunk is computed alone, so a sequence's tokens are
bit-equal alone and in any batch; across different chunkings of a prompt they agree within rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from octavo.models.spec import ModelSpec
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
    Sampled,
    SampleResult,
    SlotState,
)
from octavo.runners.freed_memory import return_freed_memory
from octavo.runners.masks import unpack_mask
from octavo.runners.reference.feed_forward import Addends
from octavo.runners.reference.kv_cache import KVCache
from octavo.runners.reference.limits import LOGITS_BLOCK_ROWS
from octavo.runners.reference.model import ReferenceModel
from octavo.runners.reference.sampling import logprob_of, sample_row
from octavo.types import Sampling, TokenLogprob

if TYPE_CHECKING:
    from octavo.weights import WeightStore


@dataclass(slots=True)
class _Slot:
    """A sequence's state, advanced by `sample`."""

    token_ids: list[int]
    prompt_tokens: int
    sampling: Sampling
    addends: Addends


class ReferenceRunner:
    def __init__(self, spec: ModelSpec, weights: WeightStore, config: RunnerConfig) -> None:
        self._spec = spec
        self._config = config
        self._device = torch.device(config.device)
        linears = linears_of(weights)  # before the model reads, and gives back, the weights
        dtype = getattr(torch, config.compute_dtype)
        self._model: ReferenceModel | None = ReferenceModel(
            spec, weights, config.context_tokens, dtype, self._device
        )
        self._cache: KVCache | None = KVCache(
            spec, config.kv_pages, getattr(torch, config.kv_dtype), self._device
        )
        self._linears = linears
        self._adapters: dict[str, Addends] = {}
        self._slots: dict[int, _Slot] = {}
        self._logits: dict[int, torch.Tensor] = {}
        """Slot -> fp32 [drafts + 1, V] of its last chunk that is to be sampled."""
        self._steps = 0

    @property
    def info(self) -> RunnerInfo:
        return RunnerInfo(
            name="reference",
            device=self._config.device,
            layout="ref-1",
            compute_dtype=self._config.compute_dtype,
            kv_dtype=self._config.kv_dtype,
            max_slots=self._config.max_slots,
            kv_pages=self._config.kv_pages,
            kernels={},
            batch_invariant=True,
            chunk_invariant=False,
        )

    def open_slot(self, slot: int, state: SlotState) -> None:
        if not 0 <= slot < self._config.max_slots or slot in self._slots:
            raise AssertionError(f"slot {slot} is taken or out of range")
        addends = {} if state.adapter is None else self._adapters[state.adapter]
        # A list of its own: sampled tokens are appended to it.
        self._slots[slot] = _Slot(list(state.token_ids), state.prompt_tokens, state.sampling, addends)

    def close_slot(self, slot: int) -> None:
        del self._slots[slot]
        self._logits.pop(slot, None)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Done[ForwardResult]:
        if self._steps == 0 and self._config.threads is not None:
            # torch keeps this number a thread: of the one that steps, so that the user's own, and another
            # model's, stay as they are. Only threads that have yet to use torch start with the latest one set.
            torch.set_num_threads(self._config.threads)
        self._steps += 1
        return Done(ForwardResult(tuple(self._forward_chunk(chunk) for chunk in batch.chunks)))

    @torch.inference_mode()
    def sample(
        self,
        batch: Batch,
        masks: Mapping[int, np.ndarray] | None = None,
        logits: Mapping[int, np.ndarray] | None = None,
    ) -> Done[SampleResult]:
        masks, logits = masks or {}, logits or {}
        return Done(
            SampleResult(
                tuple(
                    self._sample_slot(chunk, masks.get(chunk.slot), logits.get(chunk.slot))
                    for chunk in batch.chunks
                    if chunk.sample
                )
            )
        )

    def logits(self, slot: int) -> np.ndarray:
        (row,) = self._logits[slot]
        copy: np.ndarray = row.cpu().numpy().copy()
        return copy

    def load_adapter(self, name: str, adapter: Adapter) -> None:
        check_adapter(name, adapter, self._linears)
        self._adapters[name] = {
            parameter: (torch.tensor(a, device=self._device), torch.tensor(b, device=self._device))
            for parameter, (a, b) in adapter.addends.items()
        }

    def drop_adapter(self, name: str) -> None:
        dropped = self._adapters.pop(name)
        assert all(slot.addends is not dropped for slot in self._slots.values()), f"{name} is in use"

    def memory(self) -> Mapping[str, int]:
        if self._model is None or self._cache is None:
            return {"weights": 0, "kv": 0}
        return {"weights": sum(t.nbytes for t in self._model.tensors), "kv": self._cache.nbytes}

    def counters(self) -> Counters:
        return Counters(eager_steps=self._steps)

    def close(self) -> None:
        self._model = self._cache = None
        self._slots.clear()
        self._adapters.clear()
        self._logits.clear()
        return_freed_memory()

    def _forward_chunk(self, chunk: Chunk) -> tuple[TokenLogprob, ...] | None:
        if self._model is None or self._cache is None:
            raise AssertionError("forward after close")
        self._model.addends.clear()
        self._model.addends.update(self._slots[chunk.slot].addends)
        ids = self._slots[chunk.slot].token_ids[-1:] if chunk.token_ids is None else chunk.token_ids
        spans = self._cache.spans(chunk.page_tables, chunk.start, chunk.tokens)
        hidden = self._model.forward(torch.tensor(ids, device=self._device), chunk.start, spans, self._cache)
        if chunk.sample:
            self._logits[chunk.slot] = self._model.logits(hidden[-1 - chunk.drafts :])
        if chunk.targets is None:
            return None
        found: list[TokenLogprob] = []
        for begin in range(0, chunk.tokens, LOGITS_BLOCK_ROWS):
            rows = self._model.logits(hidden[begin : begin + LOGITS_BLOCK_ROWS])
            for row, target in zip(rows, chunk.targets[begin : begin + LOGITS_BLOCK_ROWS], strict=True):
                if target >= 0:
                    found.append(logprob_of(row, target, chunk.top_logprobs))
        return tuple(found)

    def _sample_slot(
        self, chunk: Chunk, mask: np.ndarray | None, replaced: np.ndarray | None
    ) -> tuple[Sampled, ...]:
        """Row by row: each token that is the one guessed leads to the next row."""
        assert not chunk.drafts or (mask is None and replaced is None), "drafts with a mask or other logits"
        rows = self._logits.pop(chunk.slot)
        guesses = chunk.token_ids[-chunk.drafts :] if chunk.token_ids is not None and chunk.drafts else ()
        found = [self._sample_row(chunk.slot, rows[0], mask, replaced)]
        for row, guess in zip(rows[1:], guesses, strict=True):
            if found[-1].token_id != guess:
                break
            found.append(self._sample_row(chunk.slot, row, None, None))
        return tuple(found)

    def _sample_row(
        self, slot: int, logits: torch.Tensor, mask: np.ndarray | None, replaced: np.ndarray | None
    ) -> Sampled:
        state = self._slots[slot]
        allowed = None if mask is None else torch.from_numpy(unpack_mask(mask, len(logits))).to(self._device)
        others = None if replaced is None else torch.tensor(replaced, device=self._device)
        token, logprob = sample_row(
            logits, state.sampling, state.token_ids, state.prompt_tokens, allowed, others
        )
        if token >= 0:
            state.token_ids.append(token)
        return Sampled(token, logprob)
