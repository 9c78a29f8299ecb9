"""Attention over pages, of one new token and of a chunk, against plain torch on the same keys and values."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from octavo.models.spec import Attention, Norm, Rope
from octavo.runners.cuda import fixed_point
from octavo.runners.cuda.batch_attention import WalkTile, batch_attention, walk_tile_for
from octavo.runners.cuda.decode_attention import Sequences, SplitTile, decode_attention, reference
from octavo.runners.cuda.device_model import DeviceNorm
from octavo.runners.cuda.gemv import shuffle
from octavo.runners.cuda.heads import reference as turned
from octavo.runners.cuda.kv_cache import LayerCache
from octavo.runners.cuda.prefill_attention import prefill_attention
from octavo.runners.cuda.rotate import rotate

ROPE = Rope("default", 1000.0, 16, tuple(float(1000.0 ** (-i / 8)) for i in range(8)))
PLAIN = Attention(heads=4, kv_heads=2, head_dim=24, scale=0.3, rope=ROPE)
CASES = {
    "partial-rotary": PLAIN,
    "window": replace(PLAIN, window=20),
    "softcap": replace(PLAIN, softcap=0.7),
    "no-rope": replace(PLAIN, rope=None),
    "qk-norm": replace(PLAIN, qk_norm=Norm("rms", 1e-5)),
    "one-group": replace(PLAIN, heads=2),
}
CONTEXT = 96


def layer_of(mixer: Attention, randn: Any, device: torch.device) -> Any:
    angles = torch.arange(CONTEXT)[:, None] * torch.tensor(ROPE.inverse_frequencies)
    norms = [DeviceNorm("rms", 1e-5, randn(mixer.head_dim), None) if mixer.qk_norm else None for _ in "qk"]
    return SimpleNamespace(
        spec=SimpleNamespace(mixer=mixer),
        cosines=angles.cos().to(device) if mixer.rope else None,
        sines=angles.sin().to(device) if mixer.rope else None,
        q_norm=norms[0],
        k_norm=norms[1],
    )


class Paged:
    """Old tokens of one sequence in pages that are not in order, and the same ones as torch has them."""

    def __init__(self, mixer: Attention, randn: Any, device: torch.device) -> None:
        self.layer = layer_of(mixer, randn, device)
        self.table = torch.tensor([3, 0, 2], dtype=torch.int32, device=device)
        shape = (4, mixer.kv_heads, 32, mixer.head_dim)
        self.cache = LayerCache(randn(*shape).half(), randn(*shape).half(), 0)

    def tokens(self, pages: torch.Tensor, count: int) -> torch.Tensor:
        """[KH, count, D]."""
        return pages[self.table.long()].transpose(0, 1).flatten(1, 2)[:, :count]

    def heads(self, qkv: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Turned q [T, H, D], k, v of rows fp32 [T, (H + 2 KH) D]."""
        mixer, count = self.layer.spec.mixer, qkv.shape[0]
        sizes = [mixer.heads * mixer.head_dim] + 2 * [mixer.kv_heads * mixer.head_dim]
        q, k, v = (t.reshape(count, -1, mixer.head_dim) for t in qkv.split(sizes, -1))
        none = torch.zeros((count, 0), device=qkv.device)
        cosines, sines = self.layer.cosines, self.layer.sines
        angles = (
            (none, none)
            if cosines is None
            else (cosines[start : start + count], sines[start : start + count])
        )
        gains = [None if norm is None else norm.gain for norm in (self.layer.q_norm, self.layer.k_norm)]
        return turned(q, *angles, gains[0], 1e-5), turned(k, *angles, gains[1], 1e-5), v


def want_of(mixer: Attention, paged: Paged, q: torch.Tensor, position: int) -> torch.Tensor:
    first = 0 if mixer.window is None else max(0, position + 1 - mixer.window)
    keys, values = (
        paged.tokens(pages, position + 1)[:, first:] for pages in (paged.cache.keys, paged.cache.values)
    )
    return reference(q, keys, values, mixer.scale, mixer.softcap)


@pytest.mark.parametrize(
    ("case", "position"),
    [(case, 70) for case in CASES] + [(case, at) for case in ("partial-rotary", "window") for at in (0, 33)],
)
def test_one_new_token(case: str, position: int, randn: Any, device: torch.device) -> None:
    mixer = CASES[case]
    paged = Paged(mixer, randn, device)
    before = paged.cache.keys.clone()
    qkv = randn(1, (mixer.heads + 2 * mixer.kv_heads) * mixer.head_dim)
    width = mixer.heads * mixer.head_dim
    out = torch.full((1, width), torch.nan, device=device)
    sequences = Sequences(
        torch.tensor([1], dtype=torch.int32, device=device),
        torch.tensor([0, position], dtype=torch.int32, device=device),
        (torch.stack((torch.full_like(paged.table, -1), paged.table)),),
        9,
    )
    splits = 2
    parts = torch.full((splits * width,), torch.nan, device=device)
    sums = torch.full((splits * mixer.heads,), torch.nan, device=device)
    decode_attention(
        paged.layer, paged.cache, qkv, sequences, parts, sums, out, SplitTile(16, splits, 4),
        prefetch=None, shuffled=True, pdl=False,
    )  # fmt: skip
    q, k, v = paged.heads(qkv, position)
    assert torch.allclose(
        paged.tokens(paged.cache.keys, position + 1)[:, -1].float(), k[0], atol=2e-3, rtol=2e-3
    )
    assert torch.allclose(
        paged.tokens(paged.cache.values, position + 1)[:, -1].float(), v[0], atol=2e-3, rtol=2e-3
    )
    assert int((paged.cache.keys != before).any(-1).sum()) == mixer.kv_heads  # nothing else was written
    want = want_of(mixer, paged, q[0], position)
    assert float((shuffle(out) - want.flatten()).norm() / want.norm()) < 3e-3


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tile", [WalkTile(16, 2, 2, 4), WalkTile(64, 1, 2, 4)], ids=["two-splits", "one"])
def test_new_tokens_of_several_sequences(case: str, tile: WalkTile, randn: Any, device: torch.device) -> None:
    """Their projections come as partial sums; a row that fills up the batch stands at position 0."""
    mixer = CASES[case]
    positions = (70, 0, 33)
    pages = [Paged(mixer, randn, device) for _ in positions]
    width = mixer.heads * mixer.head_dim
    many = LayerCache(torch.cat([p.cache.keys for p in pages]), torch.cat([p.cache.values for p in pages]), 0)
    tables = torch.stack([4 * index + p.table for index, p in enumerate(pages)])
    sequences = Sequences(
        torch.tensor([2, 0, 1], dtype=torch.int32, device=device),
        torch.tensor([0, 33, 70], dtype=torch.int32, device=device),
        (tables[[1, 2, 0]],),
        9,
    )
    halves = randn(2, 3, (mixer.heads + 2 * mixer.kv_heads) * mixer.head_dim)
    parts = torch.full((3 * tile.splits * width,), torch.nan, device=device)
    sums = torch.full((3 * tile.splits * mixer.heads,), torch.nan, device=device)
    planes = fixed_point.Planes(
        torch.full((3, 2, 128), 77, dtype=torch.int8, device=device), torch.full((3, 2), 7.0, device=device)
    )
    batch_attention(pages[0].layer, many, halves, sequences, parts, sums, planes, tile, pdl=False)
    got = fixed_point.dequantize(planes)
    assert bool((got[:, width:] == 0).all())
    for index, (page, position) in enumerate(zip(pages, positions, strict=True)):
        page.layer = pages[0].layer  # of the gains of its norms
        page.cache = LayerCache(many.keys[4 * index :][:4], many.values[4 * index :][:4], 0)
        q, k, v = page.heads(halves.sum(0)[index : index + 1], position)
        added = [page.tokens(p, position + 1)[:, -1].float() for p in (page.cache.keys, page.cache.values)]
        assert torch.allclose(added[0], k[0], atol=4e-3, rtol=2e-3)
        assert torch.allclose(added[1], v[0], atol=4e-3, rtol=2e-3)
        want = want_of(mixer, page, q[0], position).flatten()
        assert float((got[index, :width] - want).norm() / want.norm()) < 3e-3


@pytest.mark.parametrize("case", ["partial-rotary", "window", "softcap"])
def test_a_chunk(case: str, randn: Any, device: torch.device) -> None:
    mixer, start, count = CASES[case], 30, 5
    paged = Paged(mixer, randn, device)
    qkv = randn(count, (mixer.heads + 2 * mixer.kv_heads) * mixer.head_dim)
    width = mixer.heads * mixer.head_dim
    q = torch.empty((count, width), dtype=torch.float16, device=device)
    rotate(paged.layer, paged.cache, qkv, q, paged.table, start)
    out = torch.full((count, width + 2), 7.0, dtype=torch.float16, device=device)
    prefill_attention(mixer, paged.cache, q, paged.table, out, start)
    heads, k, _ = paged.heads(qkv, start)
    assert torch.allclose(
        paged.tokens(paged.cache.keys, start + count)[:, start:].float(), k.transpose(0, 1), atol=4e-3
    )
    want = torch.stack([want_of(mixer, paged, heads[i], start + i).flatten() for i in range(count)])
    assert float((out[:, :-2].float() - want).norm() / want.norm()) < 5e-3
    assert bool((out[:, -2:] == 7).all())


def test_a_chunk_reads_no_page_that_was_handed_back(randn: Any, device: torch.device) -> None:
    """Its place in the table says -1; page 0 is another sequence's by now, and holds NaN."""
    mixer, start, count = CASES["window"], 70, 5
    paged = Paged(mixer, randn, device)
    paged.table = torch.tensor([-1, 1, 2], dtype=torch.int32, device=device)
    paged.cache.keys[0] = paged.cache.values[0] = torch.nan
    qkv = randn(count, (mixer.heads + 2 * mixer.kv_heads) * mixer.head_dim)
    q = torch.empty((count, mixer.heads * mixer.head_dim), dtype=torch.float16, device=device)
    rotate(paged.layer, paged.cache, qkv, q, paged.table, start)
    out = torch.empty_like(q)
    prefill_attention(mixer, paged.cache, q, paged.table, out, start)
    heads, _, _ = paged.heads(qkv, start)
    want = torch.stack([want_of(mixer, paged, heads[i], start + i).flatten() for i in range(count)])
    assert float((out.float() - want).norm() / want.norm()) < 5e-3


@pytest.mark.parametrize(
    ("sequences", "dim", "context", "want"),
    [
        (8, 128, 512, (64, 4)),
        (32, 128, 512, (32, 2)),
        (128, 128, 512, (32, 1)),
        (8, 256, 512, (32, 4)),
        (8, 128, 64, (64, 1)),
    ],
)
def test_splits_fill_the_card(sequences: int, dim: int, context: int, want: tuple[int, int]) -> None:
    """132 multiprocessors, 8 kv heads; never more splits than tiles."""
    tile = walk_tile_for(replace(PLAIN, heads=32, kv_heads=8, head_dim=dim), sequences, context, 132)
    assert (tile.tokens, tile.splits) == want
