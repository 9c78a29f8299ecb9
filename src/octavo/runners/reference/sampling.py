"""The sampling law (docs/sampling.md) in torch, for one row of logits on any device.

The same steps in the same order as the numpy law in `octavo.engine.sampling`, which tests hold it to.
Shape letters: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from octavo.types import GREEDY_BELOW, Sampling, TokenLogprob

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def sample_row(
    logits: torch.Tensor,
    sampling: Sampling,
    token_ids: Sequence[int],
    prompt_tokens: int,
    mask: torch.Tensor | None,
    replaced: torch.Tensor | None = None,
) -> tuple[int, TokenLogprob | None]:
    """The next token after `token_ids` (prompt first) from fp32 [V]; -1 where the row is not finite.

    `mask` is bool [V], True where a token is allowed. `replaced` fp32 [V] is sampled from instead of `logits`,
    whose logprobs are returned all the same.
    """
    given = logits if replaced is None else replaced
    if not torch.isfinite(logits.max()) or not torch.isfinite(given.max()):
        return -1, None  # NaN wins every max; all -inf leaves -inf
    shaped = _shaped(given, sampling, token_ids, prompt_tokens)
    if mask is not None:
        shaped = shaped.masked_fill(~mask, -torch.inf)
    best = shaped.max()
    if not torch.isfinite(best):
        return -1, None
    if sampling.temperature < GREEDY_BELOW:
        token = int(best_ids(shaped, 1))
    else:
        scaled = (shaped - best) / torch.full_like(best, sampling.temperature)
        scaled = _filtered(shaped, scaled, sampling)
        noise = gumbel_noise(sampling, len(token_ids), len(scaled), scaled.device)
        token = int(best_ids(scaled + noise, 1))
    if sampling.logprobs is None:
        return token, None
    return token, logprob_of(logits, token, sampling.logprobs)


def logprob_of(logits: torch.Tensor, token: int, top: int) -> TokenLogprob:
    """The token's logprob and the `top` best ones of a row of fp32 logits [V], best first, ties by lowest id."""
    logprobs = logits.log_softmax(-1)
    if top == 0:
        return TokenLogprob(token, float(logprobs[token]))
    ids = best_ids(logits, top)  # logprobs are rounded again: different logits may have equal ones
    best = tuple(zip(ids.tolist(), logprobs[ids].tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), best)


def best_ids(values: torch.Tensor, count: int) -> torch.Tensor:
    """Ids of the `count` largest of [V], largest first, ties by lowest id (torch.topk promises no order)."""
    if count == 1:
        return values.argmax(keepdim=True)
    if count >= len(values):
        return values.sort(descending=True, stable=True).indices
    least = values.topk(count).values[-1]
    above = (values > least).nonzero().squeeze(1)
    equal = (values == least).nonzero().squeeze(1)[: count - len(above)]
    order = values[above].sort(descending=True, stable=True).indices
    return torch.cat([above[order], equal])


def _shaped(
    logits: torch.Tensor, sampling: Sampling, token_ids: Sequence[int], prompt_tokens: int
) -> torch.Tensor:
    """Penalties and bias, in the law's order."""
    scores = logits.clone()
    device = logits.device
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(token_ids)), device=device)
        value = scores[seen]
        # A tensor on the device: torch divides by a number on CUDA as times its reciprocal, an ulp off.
        penalty = torch.tensor(sampling.repetition_penalty, device=device)
        scores[seen] = torch.where(value > 0, value / penalty, value * penalty)
    if sampling.frequency_penalty or sampling.presence_penalty:
        generated = torch.tensor(token_ids[prompt_tokens:], dtype=torch.int64, device=device)
        counts = torch.bincount(generated, minlength=len(scores)).float()
        scores -= counts * sampling.frequency_penalty
        scores -= (counts > 0).float() * sampling.presence_penalty
    for token, bias in sampling.logit_bias:
        scores[token] += bias
    return scores


def _filtered(shaped: torch.Tensor, scaled: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """`scaled` with what top-k, top-p and min-p drop set to -inf; `shaped` gives the order."""
    dropped = torch.zeros_like(scaled, dtype=torch.bool)
    if sampling.top_k or sampling.top_p < 1:
        order = best_ids(shaped, sampling.top_k or len(shaped))
        if sampling.top_p < 1:
            weights = scaled[order].exp()
            cumulative = weights.cumsum(-1)
            # A token stays while what stands before it is short of the share: the best one always does.
            order = order[cumulative - weights < sampling.top_p * cumulative[-1]]
        dropped = torch.ones_like(dropped).index_fill_(0, order, False)
    if sampling.min_p > 0:
        dropped |= scaled < math.log(sampling.min_p)
    return scaled.masked_fill(dropped, -torch.inf)


def gumbel_noise(sampling: Sampling, position: int, vocabulary: int, device: torch.device) -> torch.Tensor:
    """fp32 [V] of Gumbel noise for the token at `position`; a function of seed, choice and position alone."""
    blocks = torch.arange(-(-vocabulary // 4), dtype=torch.int64, device=device)
    zeros = torch.zeros_like(blocks)
    counter = (blocks, zeros + position, zeros + (sampling.seed >> 32), zeros)
    words = torch.stack(_philox(counter, (sampling.seed & _WORD, sampling.choice & _WORD)), dim=1)
    uniform = ((words.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform)).flatten()[:vocabulary]


def _philox(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10 (Salmon et al., 2011) on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a * b; the product is taken in halves, since int64 has a sign bit."""
    low = (a & 0xFFFF) * b  # < 2**48
    high = (a >> 16) * b  # < 2**48
    total = low + ((high & 0xFFFF) << 16)  # < 2**49
    return (high >> 16) + (total >> 32), total & _WORD
