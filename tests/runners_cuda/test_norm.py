"""Joining the residual stream: every place and kind of norm, and the forms its result takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from octavo.runners.cuda import fixed_point
from octavo.runners.cuda.device_model import DeviceNorm
from octavo.runners.cuda.norm import join_residual, reference

WIDTH, PADDED = 72, 128


def norm_of(kind: str, randn: Any) -> DeviceNorm:
    return DeviceNorm(kind, 1e-5, randn(WIDTH), randn(WIDTH) if kind == "layernorm" else None)


def apply(norm: DeviceNorm | None, x: torch.Tensor) -> torch.Tensor:
    return x if norm is None else reference(x, norm.kind, norm.eps, norm.gain, norm.bias)


@pytest.mark.parametrize(
    ("post", "pre"), [(None, "rms"), ("rms", "rms"), ("layernorm", "layernorm"), ("rms", None)]
)
def test_sum_and_norms(post: str | None, pre: str | None, randn: Any) -> None:
    h, y = randn(2, WIDTH), randn(2, WIDTH)
    after = None if post is None else norm_of(post, randn)
    before = None if pre is None else norm_of(pre, randn)
    want_h = h + 0.5 * apply(after, y)
    want = F.pad(apply(before, want_h), (0, PADDED - WIDTH))
    x = torch.full((2, PADDED), torch.nan, device=h.device)
    join_residual(h, y, x, post=after, pre=before, multiplier=0.5, pdl=False)
    assert torch.allclose(h, want_h, atol=1e-5)
    assert torch.allclose(x, want, atol=1e-5)


def test_partial_sums_are_added_in_order(randn: Any) -> None:
    h, parts = randn(2, WIDTH), randn(3, 2, WIDTH)
    want = h + ((parts[0] + parts[1]) + parts[2])
    join_residual(h, parts, None, post=None, pre=None, multiplier=1.0, pdl=False)
    assert torch.equal(h, want)


@pytest.mark.parametrize("block", [32, 64, PADDED])
def test_fixed_point_is_the_reference_and_an_outlier_costs_its_own_block(block: int, randn: Any) -> None:
    h = randn(2, WIDTH)
    h[0, 3] = 3000.0
    norm = norm_of("rms", randn)
    planes = fixed_point.Planes(
        torch.zeros((2, 2, PADDED), dtype=torch.int8, device=h.device),
        torch.zeros((2, PADDED // block), device=h.device),
    )
    want = F.pad(apply(norm, h), (0, PADDED - WIDTH))
    join_residual(h.clone(), None, planes, post=None, pre=norm, multiplier=1.0, pdl=False)
    got = fixed_point.dequantize(planes)
    error = (got - want).abs().unflatten(-1, (-1, block)).amax(-1)
    largest = want.abs().unflatten(-1, (-1, block)).amax(-1)
    assert bool((error <= largest / 65024 * 1.01 + 1e-6).all())
    assert block == PADDED or float(error[0, 1]) < 1e-4 * float(error[0, 0] + 1)
    again = fixed_point.dequantize(fixed_point.reference(want, block))
    assert torch.allclose(got, again, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("block", [32, PADDED])
def test_what_is_not_a_number_does_not_become_one(block: int, randn: Any) -> None:
    h = randn(2, WIDTH)
    h[1, 5] = torch.nan
    planes = fixed_point.Planes(
        torch.zeros((2, 2, PADDED), dtype=torch.int8, device=h.device),
        torch.zeros((2, PADDED // block), device=h.device),
    )
    join_residual(h, None, planes, post=None, pre=norm_of("rms", randn), multiplier=1.0, pdl=False)
    assert bool(planes.scales[0].isfinite().all())
    assert not bool(planes.scales[1, : -(-WIDTH // block)].isfinite().any())
