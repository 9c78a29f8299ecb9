"""What is asked of a model in a round, what a round gives, and medians with their spread."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Workload:
    """Greedy, past every end of sequence, so that all do the same work."""

    prompt_tokens: int
    new_tokens: int
    """At least 2: decoding is timed from the first to the last."""
    sequences: int

    def prompts(self, vocab_size: int, round_number: int) -> list[list[int]]:
        """Random token ids, other ones each round: nothing of a prompt can be reused."""
        source = random.Random(round_number)
        return [
            [source.randrange(vocab_size) for _ in range(self.prompt_tokens)] for _ in range(self.sequences)
        ]


@dataclass(frozen=True, slots=True)
class Round:
    """Rates are of all sequences together."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    first_token_seconds: float
    """Until every sequence has its first token."""
    total_tokens_per_second: float
    """Prompt and new tokens over the whole time."""

    @classmethod
    def of_sequences(
        cls, workload: Workload, first_token_seconds: Sequence[float], total_seconds: Sequence[float]
    ) -> Self:
        """From each sequence's wall-clock times since all were submitted.

        Decoding counts from the first sequence's first token to the last sequence's last one: prompts that are
        still being read meanwhile cost it.
        """
        every_first = max(first_token_seconds)
        decoded = workload.sequences * (workload.new_tokens - 1)
        tokens = workload.sequences * (workload.prompt_tokens + workload.new_tokens)
        return cls(
            prefill_tokens_per_second=workload.sequences * workload.prompt_tokens / every_first,
            decode_tokens_per_second=decoded / (max(total_seconds) - min(first_token_seconds)),
            first_token_seconds=every_first,
            total_tokens_per_second=tokens / max(total_seconds),
        )


@dataclass(frozen=True, slots=True)
class Spread:
    """Of the same figure over rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        return cls(statistics.median(values), min(values), max(values))
