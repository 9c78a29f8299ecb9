"""The sampling law (docs/sampling.md) on the device for one row of logits, without waiting for it.

What `pick` does not do: penalties, bias, masks, temperature, filters. Torch calls whose shapes depend on nothing
on the device, so the host goes on; correct first, and counted as eager. Shape letters: V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from octavo.runners.base import SlotState
from octavo.runners.reference.sampling import gumbel_noise
from octavo.types import GREEDY_BELOW, Sampling, TokenLogprob


@dataclass(frozen=True, slots=True)
class SlotLaw:
    """A slot's parameters, and on the device what penalties count."""

    sampling: Sampling
    in_prompt: torch.Tensor | None
    """bool [V]; None where nothing is penalized."""
    generated: torch.Tensor | None
    """int32 [V], written by `sample_row`."""
    bias_ids: torch.Tensor
    biases: torch.Tensor

    @property
    def is_plain_greedy(self) -> bool:
        """The argmax of the model's own logits, and nothing to report beside it."""
        sampling = self.sampling
        greedy = sampling.temperature < GREEDY_BELOW
        return greedy and self.in_prompt is None and not sampling.logit_bias and sampling.logprobs is None


def slot_law(state: SlotState, vocabulary: int, device: torch.device) -> SlotLaw:
    sampling = state.sampling
    in_prompt = generated = None
    penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    if penalties != (1.0, 0.0, 0.0):
        prompt = np.zeros(vocabulary, dtype=np.bool_)
        prompt[list(state.token_ids[: state.prompt_tokens])] = True
        counts = np.bincount(state.token_ids[state.prompt_tokens :], minlength=vocabulary).astype(np.int32)
        in_prompt, generated = torch.from_numpy(prompt).to(device), torch.from_numpy(counts).to(device)
    ids, values = zip(*sampling.logit_bias, strict=True) if sampling.logit_bias else ((), ())
    return SlotLaw(
        sampling,
        in_prompt,
        generated,
        torch.tensor(ids, dtype=torch.int64, device=device),
        torch.tensor(values, dtype=torch.float32, device=device),
    )


def sample_row(
    logits: torch.Tensor, law: SlotLaw, position: int, allowed: torch.Tensor | None
) -> torch.Tensor:
    """The token for `position` from fp32 [V] as an int64 scalar; -1 where the row is not finite. Counts it.

    `allowed` bool [V].
    """
    sampling = law.sampling
    finite = logits.max().isfinite()
    shaped = _shaped(logits, law)
    if allowed is not None:
        shaped = shaped.masked_fill(~allowed, -torch.inf)
    best = shaped.max()
    finite = finite & best.isfinite()
    if sampling.temperature < GREEDY_BELOW:
        token = shaped.argmax()
    else:
        # Divisors are tensors: torch divides by a number as times its reciprocal, an ulp off.
        scaled = (shaped - best) / torch.full_like(best, sampling.temperature)
        scaled = _filtered(shaped, scaled, sampling)
        token = (scaled + gumbel_noise(sampling, position, len(scaled), scaled.device)).argmax()
    if law.generated is not None:
        law.generated[token] += finite.to(torch.int32)
    return torch.where(finite, token, -1)


def unpack_mask(words: np.ndarray, vocabulary: int, device: torch.device) -> torch.Tensor:
    """uint32 [ceil(V / 32)] -> bool [V]."""
    bits = np.unpackbits(words.astype("<u4").view(np.uint8), bitorder="little", count=vocabulary)
    return torch.from_numpy(bits.view(np.bool_)).to(device)


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """Logprobs of some rows, still on the device."""

    chosen: torch.Tensor
    """fp32 [rows]."""
    top_ids: torch.Tensor
    """[rows, top], best first, ties by lowest id."""
    top: torch.Tensor

    def read(self, token_ids: list[int]) -> tuple[TokenLogprob, ...]:
        """Waits for them. `token_ids`: of each row."""
        chosen, ids, top = self.chosen.tolist(), self.top_ids.tolist(), self.top.tolist()
        return tuple(
            TokenLogprob(token, value, tuple(zip(row_ids, row_top, strict=True)))
            for token, value, row_ids, row_top in zip(token_ids, chosen, ids, top, strict=True)
        )


def logprobs_of(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> LogprobRows:
    """Log-softmax of fp32 [rows, V] at int64 [rows], and the `top` most probable tokens of each row."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, tokens.clamp_min(0)[:, None])[:, 0]
    # Ordered by logits: logprobs are rounded again, and different logits may have equal ones.
    ids = (
        logits.sort(dim=-1, descending=True, stable=True).indices[:, :top] if top else tokens[:, None][:, :0]
    )
    return LogprobRows(chosen, ids, logprobs.gather(1, ids))


def _shaped(logits: torch.Tensor, law: SlotLaw) -> torch.Tensor:
    """Penalties and bias, in the law's order."""
    sampling, scores = law.sampling, logits
    if law.in_prompt is not None and law.generated is not None:
        if sampling.repetition_penalty != 1:
            penalty = torch.full_like(scores[:1], sampling.repetition_penalty)
            penalized = torch.where(scores > 0, scores / penalty, scores * penalty)
            scores = torch.where(law.in_prompt | (law.generated > 0), penalized, scores)
        counts = law.generated.float()
        lowered = (scores - counts * sampling.frequency_penalty) - sampling.presence_penalty
        scores = torch.where(law.generated > 0, lowered, scores)
    if sampling.logit_bias:
        scores = scores.index_add(0, law.bias_ids, law.biases)
    return scores


def _filtered(shaped: torch.Tensor, scaled: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """`scaled` with what top-k, top-p and min-p drop set to -inf; `shaped` gives the order."""
    if sampling.top_k or sampling.top_p < 1:
        order = shaped.sort(descending=True, stable=True).indices
        kept = torch.ones_like(order, dtype=torch.bool)
        if sampling.top_k:
            kept[sampling.top_k :] = False
        if sampling.top_p < 1:
            weights = scaled[order].exp() * kept
            cumulative = weights.cumsum(-1)
            # A token stays while what stands before it is short of the share: the best one always does.
            kept &= cumulative - weights < sampling.top_p * cumulative[-1]
        scaled = scaled.masked_fill(torch.empty_like(kept).scatter_(0, order, ~kept), -torch.inf)
    if sampling.min_p > 0:
        scaled = scaled.masked_fill(scaled < math.log(sampling.min_p), -torch.inf)
    return scaled
