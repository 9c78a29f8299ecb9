"""What the sampling law knows of each slot, in device arrays that a step's kernels read: parameters are data.

A row of `words` is written when a slot opens (one copy); rows of `counts` and `biases` only where the law reads
them. Any mixture of parameters in a batch runs the same kernels.
Shape letters: V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import triton.language as tl

from octavo.runners.base import SlotState
from octavo.runners.reference.sampling import GREEDY_BELOW
from octavo.types import Sampling

WORDS = tl.constexpr(16)
"""int32 words of a slot; floats as their bits."""
TEMPERATURE = tl.constexpr(0)
TOP_P = tl.constexpr(1)
LOG_MIN_P = tl.constexpr(2)
REPETITION = tl.constexpr(3)
FREQUENCY = tl.constexpr(4)
PRESENCE = tl.constexpr(5)
TOP_K = tl.constexpr(6)
SEED_LOW = tl.constexpr(7)
SEED_HIGH = tl.constexpr(8)
CHOICE = tl.constexpr(9)
TRAITS = tl.constexpr(10)

GREEDY = tl.constexpr(1)
PENALIZED = tl.constexpr(2)
BIASED = tl.constexpr(4)

IN_PROMPT = tl.constexpr(1 << 30)
"""Set in a token's count where the prompt holds it."""


@dataclass(frozen=True, slots=True)
class SlotLaws:
    """Of all slots, and of the spare one that fills up a batch."""

    words: torch.Tensor
    """int32 [slots + 1, WORDS]."""
    counts: torch.Tensor
    """int32 [slots + 1, V]: times a token was generated, and IN_PROMPT."""
    biases: torch.Tensor
    """fp32 [slots + 1, V]."""

    @classmethod
    def empty(cls, slots: int, vocabulary: int, device: torch.device) -> SlotLaws:
        words = torch.zeros((slots + 1, WORDS.value), dtype=torch.int32, device=device)
        counts = torch.zeros((slots + 1, vocabulary), dtype=torch.int32, device=device)
        return cls(words, counts, torch.zeros((slots + 1, vocabulary), device=device))

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.counts.nbytes + self.biases.nbytes

    def open(self, slot: int, state: SlotState) -> None:
        """Write a slot's rows; queued behind what the stream still does with the slot."""
        sampling = state.sampling
        self.words[slot].copy_(_pinned(torch.from_numpy(_words_of(sampling)), self.words), non_blocking=True)
        if is_penalized(sampling):
            vocabulary = self.counts.shape[1]
            counts = np.bincount(state.token_ids[state.prompt_tokens :], minlength=vocabulary)
            row = counts.astype(np.int32)
            row[list(state.token_ids[: state.prompt_tokens])] |= IN_PROMPT.value
            self.counts[slot].copy_(_pinned(torch.from_numpy(row), self.counts), non_blocking=True)
        if sampling.logit_bias:
            ids, values = zip(*sampling.logit_bias, strict=True)
            biases = np.zeros(self.biases.shape[1], np.float32)
            biases[list(ids)] = values
            self.biases[slot].copy_(_pinned(torch.from_numpy(biases), self.biases), non_blocking=True)


def is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature < GREEDY_BELOW


def is_penalized(sampling: Sampling) -> bool:
    """Whether the law reads and keeps counts."""
    penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    return penalties != (1.0, 0.0, 0.0)


def is_plain_greedy(sampling: Sampling) -> bool:
    """Whether the token is the argmax of the model's own logits."""
    return is_greedy(sampling) and not is_penalized(sampling) and not sampling.logit_bias


def _words_of(sampling: Sampling) -> np.ndarray:
    words = np.zeros(WORDS.value, np.int32)
    floats, unsigned = words.view(np.float32), words.view(np.uint32)
    floats[TEMPERATURE.value] = sampling.temperature
    floats[TOP_P.value] = sampling.top_p
    floats[LOG_MIN_P.value] = math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf
    floats[REPETITION.value] = sampling.repetition_penalty
    floats[FREQUENCY.value] = sampling.frequency_penalty
    floats[PRESENCE.value] = sampling.presence_penalty
    words[TOP_K.value] = sampling.top_k
    unsigned[SEED_LOW.value] = sampling.seed & 0xFFFFFFFF
    unsigned[SEED_HIGH.value] = sampling.seed >> 32
    unsigned[CHOICE.value] = sampling.choice
    traits = GREEDY.value if is_greedy(sampling) else 0
    traits |= PENALIZED.value if is_penalized(sampling) else 0
    words[TRAITS.value] = traits | (BIASED.value if sampling.logit_bias else 0)
    return words


def _pinned(values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    # torch keeps a pinned block until the stream is past the copy that reads it.
    return values.pin_memory() if target.is_cuda else values
