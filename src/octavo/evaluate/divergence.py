"""How far a model's next-token distributions are from another's on the same text: KL divergence and top-1
agreement. Shape letters: T tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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


def divergences(
    truth: LogitsOf, others: Mapping[str, LogitsOf], segments: Iterable[Sequence[int]]
) -> dict[str, Divergence]:
    """KL(truth || other) in nats a token, in float64, for each of the others; one segment's logits at a time."""
    kls: dict[str, list[torch.Tensor]] = {name: [] for name in others}
    agreements: dict[str, list[torch.Tensor]] = {name: [] for name in others}
    for segment in segments:
        expected = truth(segment)
        best, logs = expected.argmax(-1), expected.double().log_softmax(-1)
        for name, other in others.items():
            found = other(segment)
            agreements[name].append(best == found.argmax(-1))
            kls[name].append((logs.exp() * (logs - found.double().log_softmax(-1))).sum(-1))
    return {name: _summary(torch.cat(kls[name]), torch.cat(agreements[name])) for name in others}


def _summary(kl: torch.Tensor, agreement: torch.Tensor) -> Divergence:
    return Divergence(
        kl_nats=float(kl.mean()),
        standard_error=float(kl.std() / len(kl) ** 0.5),
        top1_agreement=float(agreement.double().mean()),
        tokens=len(kl),
    )
