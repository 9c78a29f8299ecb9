"""Parts of attention put together, in each form that a product takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from octavo.runners.cuda import fixed_point
from octavo.runners.cuda.decode_attention import combine_kernel
from octavo.runners.cuda.gemv import shuffle

B, S, H, D, WIDTH, POSITION = 2, 4, 3, 96, 320, 40
"""Head dims and columns that are no power of two; two of the four splits are used."""


@pytest.mark.parametrize("form", ["planes", "shuffled", "values"])
def test_used_splits_are_weighted_by_their_sums(form: str, randn: Any, device: torch.device) -> None:
    parts, sums = randn(B, S, H, D), 3 * randn(B, S, H)
    parts[:, 2:], sums[:, 2:] = torch.nan, torch.nan
    slots = torch.tensor([1, 0], dtype=torch.int32, device=device)
    positions = torch.full((2,), POSITION, dtype=torch.int32, device=device)
    planes = fixed_point.Planes(
        torch.zeros((B, 2, WIDTH), dtype=torch.int8, device=device),
        torch.zeros((B, WIDTH // 32), device=device),
    )
    out = torch.zeros((B, WIDTH), device=device)
    combine_kernel[(B * H,)](
        parts, sums, slots, positions, planes.pairs if form == "planes" else out, planes.scales,
        H=H, D=D, DP=128, S=S, WINDOW=0, CT=32, FORM=form, WIDTH=WIDTH, PDL=False, num_warps=2,
    )  # fmt: skip
    weight = (sums[:, :2] * 0.6931471805599453).softmax(1)
    want = torch.zeros_like(out)
    want[:, : H * D] = (parts[:, :2] * weight[..., None]).sum(1).flatten(1)
    if form == "planes":
        out = fixed_point.dequantize(planes)
    elif form == "shuffled":
        out = shuffle(out)
    assert float((out - want).norm() / want.norm()) < 3e-5
    assert not bool(out[:, H * D :].any())
