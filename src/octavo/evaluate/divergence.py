"""How far a model's next-token distributions are from another's on the same text: KL divergence and top-1
agreement. Shape letters: T tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

LogitsOf = Callable[[Sequence[int]], torch.Tensor]
"""Token ids of one segment -> fp32 logits [T, V]."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Averages over tokens; `standard_error` is of the mean, taken over segments' tokens as independent."""

    kl_nats: float
    standard_error: float
    top1_agreement: float
    tokens: int


def divergence(truth: LogitsOf, other: LogitsOf, segments: Iterable[Sequence[int]]) -> Divergence:
    """KL(truth || other) in nats a token, in float64, one segment's logits in memory at a time."""
    kls, agreements = [], []
    for segment in segments:
        p, q = truth(segment), other(segment)
        agreements.append(p.argmax(-1) == q.argmax(-1))
        p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        kls.append((p.exp() * (p - q)).sum(-1))
    kl = torch.cat(kls)
    return Divergence(
        kl_nats=float(kl.mean()),
        standard_error=float(kl.std() / len(kl) ** 0.5),
        top1_agreement=float(torch.cat(agreements).double().mean()),
        tokens=len(kl),
    )
