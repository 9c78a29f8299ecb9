"""Sampling as the library takes it: parameters, samples and logprobs as structs, with the arrays they point to.

The law itself is csrc/sampling.cpp. Shape letters: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from octavo.runners.base import Sampled
from octavo.runners.cpu import library
from octavo.types import Sampling, TokenLogprob


class WantedLogprobs:
    """Arrays the library writes logprobs to: one a row, and the `top` best of each row."""

    def __init__(self, rows: int, top: int) -> None:
        self._logprobs = np.empty(rows, np.float32)
        self._top_ids = np.empty((rows, top), np.int32)
        self._top_logprobs = np.empty((rows, top), np.float32)
        self.struct = library.Logprobs(
            logprobs=self._logprobs.ctypes.data,
            top_ids=self._top_ids.ctypes.data,
            top_logprobs=self._top_logprobs.ctypes.data,
            top=top,
        )

    def read(self, row: int, token_id: int) -> TokenLogprob:
        top = zip(self._top_ids[row].tolist(), self._top_logprobs[row].tolist(), strict=True)
        # An id of -1: fewer tokens than asked for have a probability.
        return TokenLogprob(token_id, float(self._logprobs[row]), tuple(pair for pair in top if pair[0] >= 0))


class WantedTokens:
    """What one slot's sampling reads and writes: `fill` a struct of the call, `read` it afterwards."""

    def __init__(
        self,
        slot: int,
        vocab_size: int,
        *,
        draft_ids: Sequence[int] = (),
        top_logprobs: int | None = None,
        mask: np.ndarray | None = None,
        logits: np.ndarray | None = None,
    ) -> None:
        """`mask` uint32 [ceil(V / 32)], `logits` fp32 [V]; `top_logprobs` None: no logprobs."""
        assert not draft_ids or (mask is None and logits is None), "drafts go with neither masks nor logits"
        self._slot = slot
        self._draft_ids = np.array(draft_ids, np.int32)
        self._token_ids = np.empty(len(draft_ids) + 1, np.int32)
        self._mask = None if mask is None else np.ascontiguousarray(mask, np.uint32)
        self._logits = None if logits is None else np.ascontiguousarray(logits, np.float32)
        assert self._mask is None or self._mask.shape == (-(-vocab_size // 32),)
        assert self._logits is None or self._logits.shape == (vocab_size,)
        self._logprobs = None
        if top_logprobs is not None:
            self._logprobs = WantedLogprobs(len(self._token_ids), min(top_logprobs, vocab_size))

    def fill(self, struct: library.SampleStruct) -> None:
        struct.slot = self._slot
        struct.drafts = len(self._draft_ids)
        struct.draft_ids = self._draft_ids.ctypes.data
        struct.token_ids = self._token_ids.ctypes.data
        struct.mask = None if self._mask is None else self._mask.ctypes.data
        struct.logits = None if self._logits is None else self._logits.ctypes.data
        if self._logprobs is not None:
            struct.logprobs = self._logprobs.struct

    def read(self, struct: library.SampleStruct) -> tuple[Sampled, ...]:
        ids = self._token_ids[: struct.tokens].tolist()
        return tuple(
            Sampled(token, self._logprobs.read(row, token) if self._logprobs and token >= 0 else None)
            for row, token in enumerate(ids)
        )


def sampling_struct(
    sampling: Sampling, vocab_size: int
) -> tuple[library.SamplingStruct, tuple[np.ndarray, ...]]:
    """The struct, and the arrays it points to."""
    ids = np.array([i for i, _ in sampling.logit_bias], np.int32)
    values = np.array([value for _, value in sampling.logit_bias], np.float32)
    assert ids.size == 0 or (ids.min() >= 0 and ids.max() < vocab_size)
    struct = library.SamplingStruct(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed,
        choice=sampling.choice,
        top_k=min(sampling.top_k, vocab_size),
        bias_ids=ids.ctypes.data,
        bias_values=values.ctypes.data,
        bias_count=len(ids),
    )
    return struct, (ids, values)
