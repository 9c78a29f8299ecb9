"""Logits of whole segments of text, straight from the reference model: what quantizing cost, and no more.

Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from octavo.models.spec import KV_PAGE_TOKENS, ModelSpec
from octavo.runners.reference.kv_cache import KVCache
from octavo.runners.reference.model import ReferenceModel

if TYPE_CHECKING:
    from octavo.weights import WeightStore


class SegmentLogits:
    """Callable: token ids of a segment, at most `segment_tokens` -> fp32 logits [T, V] on the CPU.

    Computes in fp32; takes the store's values and closes it.
    """

    def __init__(self, spec: ModelSpec, weights: WeightStore, segment_tokens: int) -> None:
        device = torch.device("cpu")
        pages = -(-segment_tokens // KV_PAGE_TOKENS)
        self._tables = tuple(tuple(range(pages)) for _ in spec.kv_groups)
        self._cache = KVCache(spec, [pages] * len(spec.kv_groups), torch.float32, device)
        self._model = ReferenceModel(spec, weights, segment_tokens, torch.float32, device)
        weights.close()

    @torch.inference_mode()
    def __call__(self, token_ids: Sequence[int]) -> torch.Tensor:
        spans = self._cache.spans(self._tables, 0, len(token_ids))
        return self._model.logits(self._model.forward(torch.tensor(token_ids), 0, spans, self._cache))
