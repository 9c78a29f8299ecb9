"""How far models are from a reference model on the same text: KL divergence, top-1 agreement, error after each layer.

Every position of every segment counts, the first included. Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from octavo.evaluate.estimates import Estimate, Share
from octavo.evaluate.logits import Forward

ForwardOf = Callable[[Sequence[int]], Forward]
"""Token ids of one segment -> its hidden states and logits."""


@dataclass(frozen=True, slots=True)
class Divergence:
    kl: Estimate
    """KL(reference || model) a token, in nats."""
    agreement: Share
    """Of positions whose most probable token is the same."""
    layer_errors: tuple[float, ...]
    """After each layer: the difference of the hidden states over the reference's, both as root mean squares."""
    tokens: int
    token_kls: tuple[float, ...] = field(default=(), repr=False)
    """Of each position: two models' differ from one to the next by less than they do from position to position."""

    def kl_beyond(self, other: Divergence) -> Estimate:
        """How much larger this KL is than another on the same text, position by position."""
        pairs = zip(self.token_kls, other.token_kls, strict=True)
        return Estimate.of([mine - theirs for mine, theirs in pairs])

    @property
    def kl_nats(self) -> float:
        return self.kl.mean

    @property
    def standard_error(self) -> float:
        """Of `kl_nats`; NaN where the text is too short to say."""
        return math.nan if self.kl.standard_error is None else self.kl.standard_error

    @property
    def top1_agreement(self) -> float:
        return self.agreement.value


def divergences(
    truth: ForwardOf,
    others: Mapping[str, ForwardOf],
    segments: Iterable[Sequence[int]],
    done: Callable[[], None] = lambda: None,
) -> dict[str, Divergence]:
    """Of each of the others from `truth`, in float64; `done` is called after each model's pass over a segment."""
    sums = {name: _Sums() for name in others}
    for segment in segments:
        expected = truth(segment)
        done()
        found = {}
        for name, other in others.items():
            found[name] = other(segment)
            sums[name].add_layers(expected, found[name])
            done()
        # A block of everybody's logits at a time: whole segments of them would take gigabytes.
        blocks = {name: forward.logits() for name, forward in found.items()}
        for logits in expected.logits():
            logs = logits.double().log_softmax(-1)
            best, probabilities = logits.argmax(-1), logs.exp()
            for name, others_blocks in blocks.items():
                sums[name].add_logits(best, logs, probabilities, next(others_blocks))
    return {name: each.divergence() for name, each in sums.items()}


@dataclass(slots=True)
class _Sums:
    kls: list[float] = field(default_factory=list)
    hits: int = 0
    errors: list[float] = field(default_factory=list)
    """For each layer, the sum of squares of the difference so far."""
    sizes: list[float] = field(default_factory=list)

    def add_logits(
        self, best: torch.Tensor, logs: torch.Tensor, probabilities: torch.Tensor, logits: torch.Tensor
    ) -> None:
        self.hits += int((best == logits.argmax(-1)).sum())
        self.kls += (probabilities * (logs - logits.double().log_softmax(-1))).sum(-1).tolist()

    def add_layers(self, expected: Forward, found: Forward) -> None:
        if not self.errors:
            self.errors, self.sizes = [0.0] * len(expected.layers), [0.0] * len(expected.layers)
        for index, (wanted, got) in enumerate(zip(expected.layers, found.layers, strict=True)):
            self.errors[index] += float((got - wanted).double().square().sum())
            self.sizes[index] += float(wanted.double().square().sum())

    def divergence(self) -> Divergence:
        return Divergence(
            kl=Estimate.of(self.kls),
            agreement=Share.of(self.hits, len(self.kls)),
            layer_errors=tuple(
                math.sqrt(error / size) if size else 0.0
                for error, size in zip(self.errors, self.sizes, strict=True)
            ),
            tokens=len(self.kls),
            token_kls=tuple(self.kls),
        )
