"""Inline assembly and its twins give the same bits."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from octavo.runners.cuda.ptx import dp4a, dp4a_twin, permute_bytes, permute_bytes_twin


@triton.jit
def _both(a, b, c, asm, twin, N: tl.constexpr):  # noqa: N803
    i = tl.arange(0, N)
    x, y, z = tl.load(a + i), tl.load(b + i), tl.load(c + i)
    tl.store(asm + i, dp4a(x, y, z))
    tl.store(twin + i, dp4a_twin(x, y, z))


def test_dp4a_twin_is_four_products(device: torch.device) -> None:
    words = torch.randint(-(2**31), 2**31 - 1, (3, 64), dtype=torch.int32, device=device)
    a, b, c = words[0], words[1], words[2] // 2
    out, twin = torch.empty_like(c), torch.empty_like(c)
    _both[(1,)](a, b, c, out, twin, 64)
    products = a.view(torch.int8).view(-1, 4).int() * b.view(torch.int8).view(-1, 4).int()
    assert torch.equal(twin, products.sum(1).int() + c)


@pytest.mark.gpu
def test_dp4a_and_its_twin_are_equal() -> None:
    a, b, c = torch.randint(-(2**31), 2**31 - 1, (3, 4096), dtype=torch.int32, device="cuda")
    asm, twin = torch.empty_like(a), torch.empty_like(a)
    _both[(1,)](a, b, c // 2, asm, twin, 4096)
    assert torch.equal(asm, twin)


@triton.jit
def _permuted(a, b, selector, asm, twin, N: tl.constexpr):  # noqa: N803
    i = tl.arange(0, N)
    x, y, z = tl.load(a + i), tl.load(b + i), tl.load(selector + i)
    tl.store(asm + i, permute_bytes(x, y, z))
    tl.store(twin + i, permute_bytes_twin(x, y, z))


def permuted(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Operands int32 [3, 256], and the results of the assembly and its twin."""
    words = torch.randint(-(2**31), 2**31 - 1, (3, 256), dtype=torch.int32, device=device)
    words[2] &= 0x77777777  # an eighth's high bit would copy a sign
    out, twin = torch.empty_like(words[0]), torch.empty_like(words[0])
    _permuted[(1,)](*words, out, twin, 256)
    return words, out, twin


def test_the_permute_twin_picks_bytes(device: torch.device) -> None:
    words, _, twin = permuted(device)
    sources = words[:2].T.contiguous().view(torch.int8)
    nibbles = torch.stack([(words[2] >> (4 * j)) & 7 for j in range(4)], -1).long()
    assert torch.equal(twin.view(torch.int8).view(-1, 4), sources.gather(1, nibbles))


@pytest.mark.gpu
def test_the_permute_and_its_twin_are_equal() -> None:
    _, asm, twin = permuted(torch.device("cuda"))
    assert torch.equal(asm, twin)
