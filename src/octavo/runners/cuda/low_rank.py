"""LoRA adapters on the device: y += (x a^T) b^T after a linear, for rows that have an adapter and no others.

A captured step serves any mix of adapters: which one a row has, where its matrices lie and of what rank they are is
read on the device. Matrices stay fp32, as adapters give them.
Contract: x [B, C], out [B, N] of one linear, whose members (q, k, v, say) are rows one under the other; a member's
addend is a fp32 [R, K] and b fp32 [rows, R]. Shape letters: B sequences, K columns, C padded columns, N output rows,
R rank, P members.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from octavo.errors import IncompatibleModelError
from octavo.runners.base import Adapter
from octavo.runners.cuda.device_model import DeviceModel, Linear
from octavo.runners.cuda.fixed_point import Planes

Addends = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Parameter name -> (a fp32 [R, K], b fp32 [N, R])."""

MOST_ADAPTERS = 64
"""At once."""
MOST_RANK = 512
_RANKS = 16
_NONE = -1


@triton.jit
def shrink_kernel(
    x, x_scales, slots, adapters, ranks, a_places, inner, stride,
    K: tl.constexpr, C: tl.constexpr, XB: tl.constexpr, P: tl.constexpr, MOST: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, MOST_R: tl.constexpr,
):  # fmt: skip
    """inner [B, P, MOST_R] = x a^T. Grid: (B, P, MOST_R / BR); `stride` of rows of x. XB 0: x is no planes."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    rank = tl.program_id(2) * BR + tl.arange(0, BR)
    adapter = tl.load(adapters + tl.load(slots + row))
    if adapter >= 0:
        place = part * MOST + adapter
        most = tl.load(ranks + place)
        if tl.program_id(2) * BR < most:
            a = tl.load(a_places + place).to(tl.pointer_type(tl.float32))
            total = tl.zeros((BR,), tl.float32)
            for first in tl.range(0, K, BK):
                column = first + tl.arange(0, BK)
                mask = column < K
                value = tl.load(x + row * stride + column, mask=mask, other=0).to(tl.float32)
                if XB > 0:
                    low = tl.load(x + row * stride + C + column, mask=mask, other=0).to(tl.float32)
                    scale = tl.load(
                        x_scales + row * ((C + XB - 1) // XB) + column // XB, mask=mask, other=0.0
                    )
                    value = (value * 256.0 + low) * scale
                inside = (rank[:, None] < most) & (column[None, :] < K)
                weight = tl.load(a + rank[:, None] * K + column[None, :], mask=inside, other=0.0)
                total += tl.sum(weight * value[None, :], 1)
            tl.store(inner + (row * P + part) * MOST_R + rank, total, mask=rank < most)


@triton.jit
def expand_kernel(
    inner, slots, adapters, ranks, b_places, starts, out, stride,
    P: tl.constexpr, MOST: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, MOST_R: tl.constexpr,
):  # fmt: skip
    """out += inner b^T. Grid: (B, P, ceil(rows of the tallest member / BN)); `stride` of rows of out."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    adapter = tl.load(adapters + tl.load(slots + row))
    if adapter >= 0:
        place = part * MOST + adapter
        most = tl.load(ranks + place)
        start = tl.load(starts + part)
        own = tl.program_id(2) * BN + tl.arange(0, BN)
        mask = own < tl.load(starts + part + 1) - start
        if most > 0:
            b = tl.load(b_places + place).to(tl.pointer_type(tl.float32))
            total = tl.zeros((BN,), tl.float32)
            for first in tl.range(0, most, BR):
                rank = first + tl.arange(0, BR)
                value = tl.load(inner + (row * P + part) * MOST_R + rank, mask=rank < most, other=0.0)
                inside = mask[:, None] & (rank[None, :] < most)
                weight = tl.load(b + own[:, None] * most + rank[None, :], mask=inside, other=0.0)
                total += tl.sum(weight * value[None, :], 1)
            target = out + row.to(tl.int64) * stride + start + own
            value = tl.load(target, mask=mask, other=0.0).to(tl.float32) + total
            tl.store(target, value.to(out.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class _Places:
    """Of one linear: what its addends' kernels read."""

    names: tuple[str, ...]
    tallest: int
    starts: torch.Tensor
    """int32 [P + 1]: of each member's rows."""
    ranks: torch.Tensor
    """int32 [P, MOST_ADAPTERS], 0 where an adapter leaves a member alone."""
    a: torch.Tensor
    """Addresses, int64 [P, MOST_ADAPTERS]."""
    b: torch.Tensor


class Adapters:
    """The loaded adapters, and which slot has which."""

    def __init__(self, model: DeviceModel, slots: int, device: torch.device) -> None:
        self._device = device
        self._loaded: dict[str, int] = {}
        self._addends: dict[int, Addends] = {}
        self._of_slot = torch.full((slots,), _NONE, dtype=torch.int32, device=device)
        self._places = {linear.members: self._empty(linear) for linear in model.linears if linear.members}

    def load(self, name: str, adapter: Adapter) -> None:
        """It fits the model: `octavo.runners.adapters`. Raises IncompatibleModelError for too many, or too high a
        rank."""
        if len(self._loaded) == MOST_ADAPTERS:
            raise IncompatibleModelError(
                f"{MOST_ADAPTERS} adapters are loaded, as many as the CUDA runner takes",
                remedy="Drop one that no request uses.",
            )
        highest = max((a.shape[0] for a, _ in adapter.addends.values()), default=0)
        if highest > MOST_RANK:
            raise IncompatibleModelError(
                f"adapter {name!r} has rank {highest}, the CUDA runner takes up to {MOST_RANK}",
                remedy="Merge the adapter into the model's weights.",
            )
        index = next(i for i in range(MOST_ADAPTERS) if i not in self._addends)
        addends = {
            parameter: (self._on_device(a), self._on_device(b))
            for parameter, (a, b) in adapter.addends.items()
        }
        self._loaded[name], self._addends[index] = index, addends
        self._write(index, addends)

    def drop(self, name: str) -> None:
        index = self._loaded.pop(name)
        self._write(index, {})
        del self._addends[index]

    def bind(self, slot: int, name: str | None) -> None:
        """From now on the slot has this adapter."""
        self._of_slot[slot] = _NONE if name is None else self._loaded[name]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes + b.nbytes for addends in self._addends.values() for a, b in addends.values())

    def add_rows(
        self, linear: Linear, x: Planes | torch.Tensor, out: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Launch the addends of a decode step's rows: x [B, C] or in fixed point, `out` [B, N], `slots`
        int32 [B]."""
        if not linear.members:
            return
        places = self._places[linear.members]
        values = x.pairs if isinstance(x, Planes) else x
        rows, parts = values.shape[0], len(places.names)
        inner = torch.empty((rows, parts, MOST_RANK), device=values.device)
        shrink_kernel[(rows, parts, MOST_RANK // _RANKS)](
            values,
            x.scales if isinstance(x, Planes) else values,
            slots,
            self._of_slot,
            places.ranks,
            places.a,
            inner,
            values.stride(0),
            K=linear.input_columns,
            C=values.shape[-1],
            XB=x.block_width if isinstance(x, Planes) else 0,
            P=parts,
            MOST=MOST_ADAPTERS,
            BR=_RANKS,
            BK=256,
            MOST_R=MOST_RANK,
            num_warps=4,
        )
        expand_kernel[(rows, parts, triton.cdiv(places.tallest, 128))](
            inner,
            slots,
            self._of_slot,
            places.ranks,
            places.b,
            places.starts,
            out,
            out.stride(0),
            P=parts,
            MOST=MOST_ADAPTERS,
            BR=_RANKS,
            BN=128,
            MOST_R=MOST_RANK,
            num_warps=4,
        )

    def of(self, name: str | None) -> Addends:
        """What a chunk of a sequence with that adapter adds."""
        return {} if name is None else self._addends[self._loaded[name]]

    def _empty(self, linear: Linear) -> _Places:
        rows = [count for _, count in linear.members]
        starts = np.concatenate(([0], np.cumsum(rows))).astype(np.int32)

        def zeros(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros((len(rows), MOST_ADAPTERS), dtype=dtype, device=self._device)

        return _Places(
            tuple(parameter for parameter, _ in linear.members),
            max(rows),
            torch.from_numpy(starts).to(self._device),
            zeros(torch.int32),
            zeros(torch.int64),
            zeros(torch.int64),
        )

    def _write(self, index: int, addends: Addends) -> None:
        for places in self._places.values():
            for part, name in enumerate(places.names):
                a, b = addends.get(name, (None, None))
                places.ranks[part, index] = 0 if a is None else a.shape[0]
                places.a[part, index] = 0 if a is None else a.data_ptr()
                places.b[part, index] = 0 if b is None else b.data_ptr()

    def _on_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(self._device)


def add_low_rank(linear: Linear, x: torch.Tensor, out: torch.Tensor, addends: Addends) -> None:
    """The addends of one sequence's rows, by the library: x [T, C], `out` [T, N]."""
    first = 0
    for parameter, rows in linear.members:
        if parameter in addends:
            a, b = addends[parameter]
            out[:, first : first + rows] += (x[:, : a.shape[1]].float() @ a.T) @ b.T
        first += rows


def reference(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """fp32 [T, K], [R, K], [N, R] -> fp32 [T, N]."""
    return (x.double() @ a.double().T @ b.double().T).float()
