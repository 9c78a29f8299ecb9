"""The sampling law of docs/sampling.md in numpy, on one row of logits at a time: every runner's oracle.

Pure functions of their arguments, so a token never depends on the batch. Arithmetic on logits is fp32,
operation by operation as the law says; sums of exponentials and the noise's logarithms are fp64 here and
may be fp32 in a runner. Imports nothing of the engine, so a runner's tests can use it alone.
Shape letters: V vocabulary, n kept tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from octavo.errors import NumericalError
from octavo.types import GREEDY_BELOW, Sampling, TokenLogprob

Logits = NDArray[np.float32]
TokenIds = NDArray[np.int64]

_PHILOX_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_PHILOX_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_PHILOX_ROUNDS = 10
_LOW_WORD = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Which tokens a sequence holds: what penalties read, and what a runner keeps in a slot."""

    in_prompt: NDArray[np.bool_]
    """[V]"""
    generated: NDArray[np.int32]
    """[V], times each token was generated; `add` writes to it."""

    @classmethod
    def of(cls, token_ids: Sequence[int], prompt_tokens: int, vocab_size: int) -> TokenCounts:
        """Counts of a sequence whose first `prompt_tokens` ids are the prompt."""
        in_prompt = np.zeros(vocab_size, dtype=np.bool_)
        in_prompt[list(token_ids[:prompt_tokens])] = True
        generated = np.zeros(vocab_size, dtype=np.int32)
        np.add.at(generated, list(token_ids[prompt_tokens:]), 1)
        return cls(in_prompt, generated)

    def add(self, token_id: int) -> None:
        """Count one more generated token."""
        self.generated[token_id] += 1


def has_penalties(sampling: Sampling) -> bool:
    """Whether the law reads `TokenCounts` for these parameters."""
    return (
        sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty != 0.0
        or sampling.presence_penalty != 0.0
    )


def check_finite(logits: Logits) -> None:
    """Raises NumericalError where a row [V] holds NaN or +inf, or nothing but -inf."""
    best = logits.max()  # numpy's max propagates NaN
    if not np.isfinite(best):
        raise NumericalError(
            f"the logits are not finite: their largest value is {best}",
            remedy="Try --dtype float32; if it persists, the checkpoint or its quantization is damaged.",
        )


@np.errstate(over="ignore")
def shape_logits(
    logits: Logits,
    sampling: Sampling,
    counts: TokenCounts | None = None,
    allowed: NDArray[np.bool_] | None = None,
) -> Logits:
    """Penalties, bias and mask on a row [V] -> a new row [V], -inf where a token cannot be sampled.

    `counts` may be None only where `has_penalties` is false. `allowed` bool [V].
    """
    shaped = logits.astype(np.float32, copy=True)
    if has_penalties(sampling):
        assert counts is not None, "penalties need counts"
        _penalize(shaped, sampling, counts)
    if sampling.logit_bias:
        ids, biases = zip(*sampling.logit_bias, strict=True)
        shaped[list(ids)] += np.array(biases, dtype=np.float32)
    if allowed is not None:
        shaped[~allowed] = -np.inf
    return shaped


def _penalize(shaped: Logits, sampling: Sampling, counts: TokenCounts) -> None:
    repetition = np.float32(sampling.repetition_penalty)
    if repetition != 1:
        seen = np.flatnonzero(counts.in_prompt | (counts.generated > 0))
        values = shaped[seen]
        shaped[seen] = np.where(values > 0, values / repetition, values * repetition)
    generated = np.flatnonzero(counts.generated)
    frequency = np.float32(sampling.frequency_penalty) * counts.generated[generated].astype(np.float32)
    shaped[generated] = (shaped[generated] - frequency) - np.float32(sampling.presence_penalty)


@np.errstate(over="ignore")
def scale(shaped: Logits, temperature: float) -> Logits:
    """(row - its largest value) / temperature, fp32 [V]: the best token is at 0, so nothing overflows."""
    scaled: Logits = (shaped - shaped.max()) / np.float32(temperature)
    return scaled


def keep(shaped: Logits, scaled: Logits, sampling: Sampling) -> TokenIds:
    """Top-k, then top-p, then min-p -> the ids that can be sampled, ascending [n], n >= 1.

    `shaped` [V] gives the order (largest first, ties lowest id), `scaled` [V] the probabilities.
    """
    ids = np.flatnonzero(shaped > -np.inf)
    if sampling.top_k or sampling.top_p < 1:
        ids = ids[_best_first(shaped[ids], sampling.top_k or ids.size)]
    if sampling.top_p < 1:
        cumulative = np.cumsum(np.exp(scaled[ids], dtype=np.float64))
        reached = int(np.searchsorted(cumulative, sampling.top_p * cumulative[-1], side="left"))
        ids = ids[: reached + 1]
    if sampling.min_p > 0:
        ids = ids[scaled[ids] >= np.float32(math.log(sampling.min_p))]
    return np.sort(ids)


def _best_first(values: Logits, count: int) -> TokenIds:
    """Indices of the `count` largest values, largest first, equal values by lowest index."""
    if 0 < count < values.size:
        threshold = np.partition(values, values.size - count)[values.size - count]
        candidates = np.flatnonzero(values >= threshold)
    else:
        candidates = np.arange(values.size)
    order = np.argsort(-values[candidates], kind="stable")
    return candidates[order[:count]]


def philox4x32(counters: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

    uint32 [n, 4] counters and one key of two 32-bit words -> uint32 [n, 4].
    """
    words = counters.T.astype(np.uint64)
    even, odd = words[0::2], words[1::2]  # words 0 and 2, words 1 and 3
    round_key = np.array([[key[0]], [key[1]]], dtype=np.uint64)
    for _ in range(_PHILOX_ROUNDS):
        crossed = (_PHILOX_MULTIPLIERS * even)[::-1]
        even = (crossed >> _WORD_BITS) ^ odd ^ round_key
        odd = crossed & _LOW_WORD
        round_key = (round_key + _PHILOX_WEYL) & _LOW_WORD
    return np.stack((even[0], odd[0], even[1], odd[1]), axis=1).astype(np.uint32)


def random_words(token_ids: TokenIds, position: int, seed: int, choice: int) -> NDArray[np.uint32]:
    """One word of 32 random bits for each token id [n] that may be sampled at `position` -> uint32 [n]."""
    blocks = token_ids // 4
    every_block = int(token_ids.max()) // 4 + 1
    dense = token_ids.size > every_block
    if dense:
        blocks = np.arange(every_block)
    counters = np.zeros((blocks.size, 4), dtype=np.uint32)
    counters[:, 0] = blocks
    counters[:, 1] = position
    counters[:, 2] = seed >> 32
    words = philox4x32(counters, (seed & 0xFFFFFFFF, choice))
    return words.reshape(-1)[token_ids] if dense else words[np.arange(blocks.size), token_ids % 4]


def gumbel(words: NDArray[np.uint32]) -> Logits:
    """32 random bits -> standard Gumbel noise, fp32, in [-2.82, 22.88].

    Small v gives the upper tail, the one that decides an argmax, and fp32 resolves small v to 2^-33.
    """
    uniform = (words.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    uniform = np.minimum(uniform, np.float32(1 - 2.0**-24))
    noise: Logits = (-np.log(-np.log1p(-uniform.astype(np.float64)))).astype(np.float32)
    return noise


def sample_token(
    logits: Logits,
    sampling: Sampling,
    position: int,
    counts: TokenCounts | None = None,
    allowed: NDArray[np.bool_] | None = None,
) -> int:
    """The whole law: the token for `position` of a sequence, from its row of fp32 logits [V].

    `position` is the token's index in the sequence, prompt included. Raises NumericalError where the row is
    not finite, or no token is left after bias and mask.
    """
    check_finite(logits)
    shaped = shape_logits(logits, sampling, counts, allowed)
    check_finite(shaped)
    if sampling.temperature < GREEDY_BELOW:
        return int(shaped.argmax())
    scaled = scale(shaped, sampling.temperature)
    ids = keep(shaped, scaled, sampling)
    noise = gumbel(random_words(ids, position, sampling.seed, sampling.choice))
    return int(ids[(scaled[ids] + noise).argmax()])


def token_logprob(logits: Logits, token_id: int, top: int) -> TokenLogprob:
    """Log-softmax of an unmodified row [V] at `token_id`, and the `top` most probable tokens, best first."""
    row = logits.astype(np.float64)
    best = row.max()
    log_total = best + np.log(np.exp(row - best).sum())

    def at(index: int) -> float:
        return float(np.float32(row[index] - log_total))

    alternatives = _best_first(logits, top) if top else ()
    return TokenLogprob(token_id, at(token_id), tuple((int(index), at(int(index))) for index in alternatives))
