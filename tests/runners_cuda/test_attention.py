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
from octavo.runners.cuda.kv_cache import LayerCache, pages_shape
from octavo.runners.cuda.kv_cache import reference as values_of
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
WIDE = {
    f"head-dim-{dim}": replace(PLAIN, head_dim=dim, softcap=5.0, scale=dim**-0.5) for dim in (64, 128, 256)
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


def in_int8(pages: torch.Tensor) -> torch.Tensor:
    """fp16 [pages, KH, 32, D] as int8 pages."""
    made = torch.empty(pages_shape(*pages.shape[:2], pages.shape[-1], torch.int8), dtype=torch.int8)
    scales = pages.float().abs().amax(-1) / 127
    codes = (pages.float() / scales[..., None]).round().to(torch.int8).flatten(2)
    made[..., : codes.shape[-1]] = codes
    made[..., codes.shape[-1] :] = scales.cpu().view(torch.int8)
    return made.to(pages.device)


class Paged:
    """Old tokens of one sequence in pages that are not in order, and the same ones as torch has them."""

    def __init__(self, mixer: Attention, randn: Any, device: torch.device, kv: str = "float16") -> None:
        self.layer = layer_of(mixer, randn, device)
        self.table = torch.tensor([3, 0, 2], dtype=torch.int32, device=device)
        made = [randn(4, mixer.kv_heads, 32, mixer.head_dim).half() for _ in "kv"]
        self.cache = LayerCache(*(made if kv == "float16" else map(in_int8, made)), 0)

    def tokens(self, pages: torch.Tensor, count: int) -> torch.Tensor:
        """[KH, count, D]."""
        return (
            values_of(pages, self.layer.spec.mixer.head_dim)[self.table.long()]
            .transpose(0, 1)
            .flatten(1, 2)[:, :count]
        )

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


def assert_stored(found: torch.Tensor, values: torch.Tensor, kv: str, tolerance: float = 2e-3) -> None:
    """int8: within half a step of its vector's scale."""
    half_step = values.abs().amax(-1, keepdim=True) / 254 if kv == "int8" else torch.zeros(())
    assert bool(((found - values).abs() <= half_step + tolerance * (1 + values.abs())).all())


MOST_ERROR = {"float16": 3e-3, "int8": 6e-3}
"""bf16 has three bits fewer than fp16."""


@pytest.mark.parametrize(
    ("case", "position", "kv"),
    [(case, 70, "float16") for case in CASES]
    + [(case, at, "float16") for case in ("partial-rotary", "window") for at in (0, 33)]
    + [(case, 70, "int8") for case in ("partial-rotary", "window", "qk-norm", *WIDE)]
    + [("window", 0, "int8")],
)
def test_one_new_token(case: str, position: int, kv: str, randn: Any, device: torch.device) -> None:
    mixer = (CASES | WIDE)[case]
    paged = Paged(mixer, randn, device, kv)
    before = paged.tokens(paged.cache.keys, CONTEXT)
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
    assert_stored(paged.tokens(paged.cache.keys, position + 1)[:, -1], k[0], kv)
    assert_stored(paged.tokens(paged.cache.values, position + 1)[:, -1], v[0], kv)
    changed = (paged.tokens(paged.cache.keys, CONTEXT) != before).any(-1)
    assert int(changed.sum()) == mixer.kv_heads  # nothing else was written
    want = want_of(mixer, paged, q[0], position)
    assert float((shuffle(out) - want.flatten()).norm() / want.norm()) < MOST_ERROR[kv]


@pytest.mark.parametrize(
    ("case", "kv"),
    [(case, "float16") for case in CASES]
    + [(case, "int8") for case in ("window", "softcap", "qk-norm", *WIDE)],
)
@pytest.mark.parametrize("tile", [WalkTile(16, 2, 2, 4), WalkTile(64, 1, 2, 4)], ids=["two-splits", "one"])
def test_new_tokens_of_several_sequences(
    case: str, kv: str, tile: WalkTile, randn: Any, device: torch.device
) -> None:
    """Their projections come as partial sums; a row that fills up the batch stands at position 0."""
    mixer = (CASES | WIDE)[case]
    positions = (70, 0, 33)
    pages = [Paged(mixer, randn, device, kv) for _ in positions]
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
        torch.full((3, 2, 64 * (width // 64 + 1)), 77, dtype=torch.int8, device=device),
        torch.full((3, width // 64 + 1), 7.0, device=device),
    )
    batch_attention(pages[0].layer, many, halves, sequences, parts, sums, planes, tile, pdl=False)
    got = fixed_point.dequantize(planes)
    assert bool((got[:, width:] == 0).all())
    for index, (page, position) in enumerate(zip(pages, positions, strict=True)):
        page.layer = pages[0].layer  # of the gains of its norms
        page.cache = LayerCache(many.keys[4 * index :][:4], many.values[4 * index :][:4], 0)
        q, k, v = page.heads(halves.sum(0)[index : index + 1], position)
        for pool, added in ((page.cache.keys, k[0]), (page.cache.values, v[0])):
            assert_stored(page.tokens(pool, position + 1)[:, -1], added, kv, 4e-3)
        want = want_of(mixer, page, q[0], position).flatten()
        assert float((got[index, :width] - want).norm() / want.norm()) < MOST_ERROR[kv]


@pytest.mark.parametrize(
    ("case", "kv"),
    [(case, "float16") for case in ("partial-rotary", "window", "softcap")]
    + [(case, "int8") for case in ("window", *WIDE)],
)
def test_a_chunk(case: str, kv: str, randn: Any, device: torch.device) -> None:
    mixer, start, count = (CASES | WIDE)[case], 30, 5
    paged = Paged(mixer, randn, device, kv)
    qkv = randn(count, (mixer.heads + 2 * mixer.kv_heads) * mixer.head_dim)
    width = mixer.heads * mixer.head_dim
    q = torch.empty((count, width), dtype=torch.float16, device=device)
    rotate(paged.layer, paged.cache, qkv, q, paged.table, start)
    out = torch.full((count, width + 2), 7.0, dtype=torch.float16, device=device)
    prefill_attention(mixer, paged.cache, q, paged.table, out, start)
    heads, k, v = paged.heads(qkv, start)
    for pool, added in ((paged.cache.keys, k), (paged.cache.values, v)):
        assert_stored(paged.tokens(pool, start + count)[:, start:], added.transpose(0, 1), kv)
    want = torch.stack([want_of(mixer, paged, heads[i], start + i).flatten() for i in range(count)])
    assert float((out[:, :-2].float() - want).norm() / want.norm()) < 5e-3
    assert bool((out[:, -2:] == 7).all())


def test_int8_costs_attention_little(randn: Any, device: torch.device) -> None:
    """A chunk over its own keys and values, rounded, against the same ones in full."""
    mixer, count = replace(WIDE["head-dim-64"], softcap=None), 40
    paged = Paged(mixer, randn, device, "int8")
    qkv = randn(count, (mixer.heads + 2 * mixer.kv_heads) * mixer.head_dim)
    q = torch.empty((count, mixer.heads * mixer.head_dim), dtype=torch.float16, device=device)
    rotate(paged.layer, paged.cache, qkv, q, paged.table, 0)
    out = torch.empty_like(q)
    prefill_attention(mixer, paged.cache, q, paged.table, out, 0)
    heads, k, v = paged.heads(qkv, 0)
    rows = [
        reference(heads[i], k[: i + 1].transpose(0, 1), v[: i + 1].transpose(0, 1), mixer.scale, None)
        for i in range(count)
    ]
    want = torch.stack(rows).flatten(1)
    assert 1e-3 < float((out.float() - want).norm() / want.norm()) < 1.5e-2


def test_a_key_that_is_no_number_stays_none_in_int8(randn: Any, device: torch.device) -> None:
    mixer = replace(PLAIN, rope=None)
    paged = Paged(mixer, randn, device, "int8")
    qkv = randn(2, (mixer.heads + 2 * mixer.kv_heads) * mixer.head_dim)
    qkv[0, mixer.heads * mixer.head_dim + 3] = torch.nan
    q = torch.empty((2, mixer.heads * mixer.head_dim), dtype=torch.float16, device=device)
    rotate(paged.layer, paged.cache, qkv, q, paged.table, 0)
    found = paged.tokens(paged.cache.keys, 2)
    assert bool(found[0, 0].isnan().all())
    assert bool(found[1, 0].isfinite().all())
    assert bool(found[0, 1].isfinite().all())


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
