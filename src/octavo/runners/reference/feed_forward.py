"""Feed-forward blocks in plain torch: a dense MLP, and a mixture of experts.

Shape letters: T tokens, N output rows, K input columns, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from octavo.models.spec import Activation, MoE

Addends = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Parameter name -> (a fp32 [R, K], b fp32 [N, R]): what an adapter adds, y += (x a^T) b^T."""


@dataclass(frozen=True, slots=True)
class Linear:
    weight: torch.Tensor  # [N, K], compute dtype
    bias: torch.Tensor | None  # [N], fp32
    parts: tuple[tuple[str, int], ...]
    """Names and rows of the parameters it is made of, one under the other."""
    addends: Addends
    """Of the adapter in use now: the model changes what is in it."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 [..., K] -> fp32 [..., N]."""
        y = F.linear(x.to(self.weight.dtype), self.weight).float()
        if self.addends:
            self._add(x, y)
        return y if self.bias is None else y + self.bias

    def _add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        for (name, _), part in zip(
            self.parts, torch.split(y, [rows for _, rows in self.parts], -1), strict=True
        ):
            if name in self.addends:
                a, b = self.addends[name]
                part += x @ a.T @ b.T


@dataclass(frozen=True, slots=True)
class DenseFeedForward:
    activation: Activation
    gated: bool
    gate_up: Linear
    """gate's rows before up's; up's alone where the MLP is not gated."""
    down: Linear

    @property
    def linears(self) -> Iterator[Linear]:
        yield from (self.gate_up, self.down)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 [T, hidden] -> fp32 [T, hidden]."""
        if not self.gated:
            return self.down(self._activate(self.gate_up(x)))
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self._activate(gate) * up)

    def _activate(self, x: torch.Tensor) -> torch.Tensor:
        if self.activation == "silu":
            return F.silu(x)
        return F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")


@dataclass(frozen=True, slots=True)
class SparseFeedForward:
    spec: MoE
    router: Linear
    """fp32 [E, hidden] whatever the compute dtype is."""
    experts: tuple[DenseFeedForward, ...]

    @property
    def linears(self) -> Iterator[Linear]:
        yield self.router
        for expert in self.experts:
            yield from expert.linears

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 [T, hidden] -> fp32 [T, hidden]; each expert sees the tokens that chose it together."""
        weights, chosen = self.router(x).softmax(-1).topk(self.spec.experts_per_token, dim=-1)
        if self.spec.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for index in sorted(set(chosen.flatten().tolist())):
            tokens, place = torch.where(chosen == index)
            out.index_add_(0, tokens, self.experts[index](x[tokens]) * weights[tokens, place, None])
        return out


FeedForwardBlock = DenseFeedForward | SparseFeedForward
