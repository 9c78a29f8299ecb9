"""Paged keys and values on the device. Pages of 32 tokens, [pages, KH, 32, D], so that a page is one piece.

Shape letters: KH kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from octavo.models.spec import KV_PAGE_TOKENS, ModelSpec


@dataclass(frozen=True, slots=True)
class LayerCache:
    keys: torch.Tensor
    values: torch.Tensor
    group: int
    """Which of `ModelSpec.kv_groups` the layer is in, i.e. which page table it reads."""


def make_cache(
    spec: ModelSpec, pages: Sequence[int], dtype: torch.dtype, device: torch.device
) -> tuple[LayerCache, ...]:
    """One a layer. Zeroed: what a kernel reads beside the tokens it wants must be numbers."""
    caches: dict[int, LayerCache] = {}
    for index, (group, count) in enumerate(zip(spec.kv_groups, pages, strict=True)):
        for layer in group.layers:
            mixer = spec.layers[layer].mixer
            shape = (count, mixer.kv_heads, KV_PAGE_TOKENS, mixer.head_dim)
            keys = torch.zeros(shape, dtype=dtype, device=device)
            caches[layer] = LayerCache(keys, torch.zeros_like(keys), index)
    return tuple(caches[layer] for layer in range(len(spec.layers)))
