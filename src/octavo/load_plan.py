"""What a load will do: the values `octavo.plan` makes, `octavo.loading` follows, and `plan` and `explain` show."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from octavo.dtypes import DtypePolicy
from octavo.nvml import CardProcess
from octavo.quant.format import Format
from octavo.runners.base import RunnerConfig

TIGHT_SHARE = 0.1
"""With less than this share of the available memory left, a plan warns; KV memory that is merely useful leaves
as much."""


@dataclass(frozen=True, slots=True)
class Context:
    tokens: int
    model_tokens: int
    """What the model's config promises."""
    fits_tokens: int
    """The largest context that would fit, at most `model_tokens`."""
    reason: str


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """All parameters of one format."""

    format: str
    tensors: int
    file_bytes: int
    """In the checkpoint."""
    packed_bytes: int
    """In the packed cache."""


@dataclass(frozen=True, slots=True)
class KVMemory:
    """One KV group (`ModelSpec.kv_groups`)."""

    window: int | None
    layers: int
    pages: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Pool:
    """One memory the load draws from: the host's, or a GPU's."""

    name: str
    """host or cuda:N."""
    parts: Mapping[str, int]
    """Bytes held while running, by part; a part that is zero is left out."""
    load_peak_bytes: int
    """Most bytes held while weights are packed and handed to the runner."""
    available_bytes: int
    usable_bytes: int
    """`available_bytes` less the reserve."""
    others: tuple[CardProcess, ...] = ()
    """Who else holds memory of a GPU, largest first; none where nobody says."""

    @property
    def running_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def needed_bytes(self) -> int:
        return max(self.running_bytes, self.load_peak_bytes)

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.usable_bytes

    @property
    def tight(self) -> bool:
        """Less than TIGHT_SHARE of the available memory would be left."""
        return self.needed_bytes > (1 - TIGHT_SHARE) * self.available_bytes


@dataclass(frozen=True, slots=True)
class Declined:
    runner: str
    reason: str


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What a load will do. Nobody changes it afterwards."""

    runner: str
    """Name of the RunnerKind."""
    layout: str
    """Id of its packed layout."""
    config: RunnerConfig
    dtypes: DtypePolicy
    formats: Mapping[str, Format]
    """By parameter name."""
    context: Context
    kv_contexts: float
    """How many sequences of the full context the KV memory holds: at least 1."""
    weights: tuple[StoredWeights, ...]
    """Largest first."""
    kv: tuple[KVMemory, ...]
    pools: tuple[Pool, ...]
    """The one that holds weights and KV first."""
    declined: tuple[Declined, ...]
    """Runners that would have come first, and why they cannot take this model."""
    reasons: tuple[str, ...]
    """Every choice above in words, in the order it was made."""
    warnings: tuple[str, ...]
    """What may go wrong all the same: memory that is nearly used up."""

    @property
    def file_bytes(self) -> int:
        return sum(part.file_bytes for part in self.weights)

    @property
    def packed_bytes(self) -> int:
        return sum(part.packed_bytes for part in self.weights)

    def to_json(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and strings."""
        return {
            "runner": self.runner,
            "layout": self.layout,
            "device": self.config.device,
            "compute_dtype": self.dtypes.compute,
            "kv_dtype": self.dtypes.kv,
            "accumulate_dtype": self.dtypes.accumulate,
            "max_sequences": self.config.max_slots,
            "threads": self.config.threads,
            "prefill_chunk_tokens": self.config.prefill_chunk_tokens,
            "context": dataclasses.asdict(self.context),
            "kv_contexts": self.kv_contexts,
            "file_bytes": self.file_bytes,
            "packed_bytes": self.packed_bytes,
            "weights": [dataclasses.asdict(part) for part in self.weights],
            "kv": [dataclasses.asdict(group) for group in self.kv],
            "memory": [
                {
                    "pool": pool.name,
                    "parts": dict(pool.parts),
                    "running_bytes": pool.running_bytes,
                    "load_peak_bytes": pool.load_peak_bytes,
                    "available_bytes": pool.available_bytes,
                    "usable_bytes": pool.usable_bytes,
                    "others": [dataclasses.asdict(each) for each in pool.others],
                }
                for pool in self.pools
            ],
            "declined": [dataclasses.asdict(each) for each in self.declined],
            "reasons": list(self.reasons),
            "warnings": list(self.warnings),
        }
