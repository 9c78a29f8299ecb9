"""Hidden states and logits of whole segments of text, straight from the reference model: what quantizing cost, and
no more.

Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from octavo.models.spec import KV_PAGE_TOKENS, ModelSpec
from octavo.runners.reference.kv_cache import KVCache
from octavo.runners.reference.model import ReferenceModel

if TYPE_CHECKING:
    from octavo.weights import WeightStore

BLOCK_TOKENS = 64
"""Rows of logits made at a time: a vocabulary of 262,144 takes 64 MiB a block."""


@dataclass(frozen=True, slots=True)
class Forward:
    """One segment through the model."""

    layers: tuple[torch.Tensor, ...]
    """After each layer, fp32 [T, hidden]."""
    model: ReferenceModel

    def logits(self) -> Iterator[torch.Tensor]:
        """fp32 [at most BLOCK_TOKENS, V], in order: T rows together."""
        with torch.inference_mode():
            hidden = self.layers[-1]
            for first in range(0, len(hidden), BLOCK_TOKENS):
                yield self.model.logits(hidden[first : first + BLOCK_TOKENS])


class SegmentLogits:
    """Callable: token ids of a segment, at most `segment_tokens` -> `Forward`.

    Computes in fp32 on the CPU; takes the store's values and closes it.
    """

    def __init__(self, spec: ModelSpec, weights: WeightStore, segment_tokens: int) -> None:
        device = torch.device("cpu")
        pages = -(-segment_tokens // KV_PAGE_TOKENS)
        self._tables = tuple(tuple(range(pages)) for _ in spec.kv_groups)
        self._cache = KVCache(spec, [pages] * len(spec.kv_groups), torch.float32, device)
        self._model = ReferenceModel(spec, weights, segment_tokens, torch.float32, device)
        weights.close()

    @torch.inference_mode()
    def __call__(self, token_ids: Sequence[int]) -> Forward:
        layers: list[torch.Tensor] = []
        spans = self._cache.spans(self._tables, 0, len(token_ids))
        self._model.forward(torch.tensor(token_ids), 0, spans, self._cache, each_layer=layers.append)
        return Forward(tuple(layers), self._model)
