"""One activation vector times a matrix: the batch-1 linear, at the speed memory gives the weights.

A CTA walks consecutive blocks of BN rows. Its first tile is in registers before it waits for the kernel before,
the next one is loaded while a tile is multiplied. A lane owns 16 bytes of a row; integer codes meet 16-bit
fixed-point activations (`fixed_point`) in dp4a, so no weight is converted; plain values are multiplied in fp32.

Contract: x [C] and the matrix [N, C] of layout `cuda-b64-1` -> fp32 [N] (+ bias). Input forms:
`planes`: high and low bytes [C] and scales [C / 32], made by a norm; `shuffled`: fp32 [C] with every block of
16 columns transposed as 4 x 4 (`shuffled_place`), quantized here, a scale a lane; `values`: fp32 [C] in order,
for plain weights only. Epilogues: `store`; `gate`: rows n and n + N / 2 -> act(gate) * up; `activate`: act(y),
both in shuffled order where SHUFFLED; `logits`: multiplier, softcap, and the best token of each CTA.
Shape letters: N output rows, C padded columns, L lanes at once, BN rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl

from octavo.runners.cuda.activation import activate, tanh
from octavo.runners.cuda.device_model import Matrix
from octavo.runners.cuda.fixed_point import block_scale, pack_bytes, quantize
from octavo.runners.cuda.ptx import dp4a, opaque, release_dependents, wait_for_inputs
from octavo.runners.cuda.tiles import LANE_COLUMNS, Tile


@triton.jit
def shuffled_place(column):
    """Where a column stands in a shuffled vector: 4 i + j and 4 j + i of each block of 16 are exchanged."""
    return (column & -16) | ((column & 3) << 2) | ((column >> 2) & 3)


@triton.jit
def _rows_of(block, N, BN: tl.constexpr, PAIRS: tl.constexpr):
    """Rows of a block; PAIRS: BN / 2 rows n, each beside its partner n + N / 2."""
    i = tl.arange(0, BN)
    if PAIRS:
        return block * (BN // 2) + i // 2 + (i % 2) * (N // 2)
    else:
        return block * BN + i


@triton.jit
def _load_codes(
    codes, rows, wanted, C: tl.constexpr, L: tl.constexpr, STEPS: tl.constexpr,
    LANE: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """STEPS tiles [L, BN, ITEMS]: the 16 bytes of each lane, as words or values."""
    lane = tl.arange(0, L)[:, None, None]
    item = tl.arange(0, ITEMS)[None, None, :]
    tiles = ()
    for step in tl.static_range(STEPS):
        row = rows[None, :, None]
        if LANE < 16:  # words of codes are few enough for 32 bits, values may not be
            row = row.to(tl.int64)
        place = row * (C // LANE * ITEMS) + (step * L + lane) * ITEMS + item
        mask = wanted[None, :, None] & (item >= 0)
        if (step + 1) * L * LANE > C:
            mask = mask & (step * L + lane < C // LANE)
        tiles = tiles + (tl.load(codes + place, mask=mask, other=0, eviction_policy="evict_first"),)
    return tiles


@triton.jit
def _load_scales(
    scales, rows, wanted, C: tl.constexpr, L: tl.constexpr, STEPS: tl.constexpr,
    LANE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """STEPS tiles [L, BN] of a scale (or a scale and a minimum in one word) a lane; [BN] where GROUP is 0."""
    if GROUP == 0:
        return (tl.load(scales + rows, mask=wanted, other=0),)
    else:
        lane = tl.arange(0, L)[:, None]
        groups: tl.constexpr = (C + GROUP - 1) // GROUP
        tiles = ()
        for step in tl.static_range(STEPS):
            place = rows[None, :] * groups + opaque((step * L + lane) * LANE // GROUP)
            mask = wanted[None, :] & (step * L + lane < C // LANE)
            tiles = tiles + (tl.load(scales + place, mask=mask, other=0),)
        return tiles


@triton.jit
def _load_planes(
    high, low, scales, C: tl.constexpr, L: tl.constexpr, STEPS: tl.constexpr, LANE: tl.constexpr
):
    """Quantized activations: words of high and low bytes [L, 1, 4] for each 16 columns of a lane, and scales."""
    lane = tl.arange(0, L)[:, None, None]
    word = tl.arange(0, 4)[None, None, :]
    flat = tl.arange(0, L)[:, None]
    words = ()
    factors = ()
    for step in tl.static_range(STEPS):
        mask = step * L + lane < C // LANE
        for half in tl.static_range(LANE // 16):
            place = (step * L + lane) * (LANE // 4) + half * 4 + word
            words = words + (
                tl.load(high + place, mask=mask, other=0),
                tl.load(low + place, mask=mask, other=0),
            )
        factors = factors + (
            tl.load(scales + (step * L + flat) * LANE // 32, mask=step * L + flat < C // LANE, other=0.0),
        )
    return words, factors


@triton.jit
def _quantize_shuffled(x, C: tl.constexpr, L: tl.constexpr, STEPS: tl.constexpr, LANE: tl.constexpr):
    """As `_load_planes`, from fp32 in shuffled order: a plane of every fourth column is contiguous there."""
    lane = tl.arange(0, L)[:, None, None]
    word = tl.arange(0, 4)[None, None, :]
    words = ()
    factors = ()
    for step in tl.static_range(STEPS):
        mask = step * L + lane < C // LANE
        values = ()
        largest = tl.zeros((L, 1, 4), tl.float32)
        for plane in tl.static_range(LANE // 4):
            value = tl.load(x + (step * L + lane) * LANE + plane * 4 + word, mask=mask, other=0.0)
            values = values + (value,)
            largest = tl.maximum(largest, tl.abs(value))
        scale, inverse = block_scale(tl.max(largest, 2))
        for half in tl.static_range(LANE // 16):
            q0 = quantize(values[half * 4], inverse[:, :, None])
            q1 = quantize(values[half * 4 + 1], inverse[:, :, None])
            q2 = quantize(values[half * 4 + 2], inverse[:, :, None])
            q3 = quantize(values[half * 4 + 3], inverse[:, :, None])
            words = words + pack_bytes(q0, q1, q2, q3)
        factors = factors + (scale,)
    return words, factors


@triton.jit
def _load_values(x, C: tl.constexpr, L: tl.constexpr, STEPS: tl.constexpr, LANE: tl.constexpr):
    lane = tl.arange(0, L)[:, None, None]
    item = tl.arange(0, LANE)[None, None, :]
    values = ()
    for step in tl.static_range(STEPS):
        values = values + (
            tl.load(x + (step * L + lane) * LANE + item, mask=step * L + lane < C // LANE, other=0.0),
        )
    return values


@triton.jit
def _sums_of(words, L: tl.constexpr, STEPS: tl.constexpr):
    """Integer sums [L, 1] of the activations of a lane of 32 columns: what a group's minimum is multiplied with."""
    ones = tl.full((L, 1, 4), 0x01010101, tl.int32)
    sums = ()
    for step in tl.static_range(STEPS):
        zero = tl.zeros((L, 1, 4), tl.int32)
        high = dp4a(ones, words[step * 4 + 2], dp4a(ones, words[step * 4], zero))
        low = dp4a(ones, words[step * 4 + 3], dp4a(ones, words[step * 4 + 1], zero))
        sums = sums + (tl.sum(high * 256 + low, 2),)
    return sums


@triton.jit
def _product(
    tiles, scales, words, factors, sums,
    L: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr, CODEC: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One block of rows times x: fp32 [BN]. For plain values `words` holds x."""
    total = tl.zeros((L, BN), tl.float32)
    for step in tl.static_range(STEPS):
        zero = tl.zeros((L, BN, 4), tl.int32)
        if CODEC == "i8":
            high = dp4a(tiles[step], words[step * 2], zero)
            low = dp4a(tiles[step], words[step * 2 + 1], zero)
            part = tl.sum(high * 256 + low, 2).to(tl.float32)
            if GROUP == 0:
                total += part * factors[step]
            else:
                total += part * (factors[step] * scales[step].to(tl.float32))
        elif CODEC == "u4":
            even = tiles[step] & 0x0F0F0F0F
            odd = (tiles[step] >> 4) & 0x0F0F0F0F
            high = dp4a(odd, words[step * 4 + 2], dp4a(even, words[step * 4], zero))
            low = dp4a(odd, words[step * 4 + 3], dp4a(even, words[step * 4 + 1], zero))
            part = tl.sum(high * 256 + low, 2).to(tl.float32)
            scale = (scales[step] & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            least = (scales[step] >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            total += (part * scale + sums[step].to(tl.float32) * least) * factors[step]
        else:
            total += tl.sum(tiles[step].to(tl.float32) * words[step], 2)
    result = tl.sum(total, 0)
    if CODEC == "i8" and GROUP == 0:
        result = result * scales[0].to(tl.float32)
    return result


@triton.jit(do_not_specialize=["N", "blocks"])
def gemv_kernel(
    x, x_low, x_scales, codes, scales, bias, out, best, best_ids, N, blocks, multiplier, softcap,
    C: tl.constexpr, L: tl.constexpr, BN: tl.constexpr, CODEC: tl.constexpr, GROUP: tl.constexpr,
    INPUT: tl.constexpr, EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr, SHUFFLED: tl.constexpr, LANE: tl.constexpr, ITEMS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """See the module. Grid: any number of CTAs up to `blocks` = ceil(N / BN)."""
    release_dependents(PDL)
    cta = tl.program_id(0)
    ctas = tl.num_programs(0)
    STEPS: tl.constexpr = (C // LANE + L - 1) // L
    PAIRS: tl.constexpr = EPILOGUE == "gate"
    first = (cta * blocks) // ctas
    last = ((cta + 1) * blocks) // ctas
    # Pairs end where gate's rows do; their partners are then in range too.
    end = N // 2 if PAIRS else N
    step_rows: tl.constexpr = BN // 2 if PAIRS else BN
    own = tl.arange(0, BN) // 2 if PAIRS else tl.arange(0, BN)

    rows = _rows_of(first, N, BN, PAIRS)
    wanted = first * step_rows + own < end
    tiles = _load_codes(codes, rows, wanted, C, L, STEPS, LANE, ITEMS)
    factors_w = (0,)
    if CODEC == "i8" or CODEC == "u4":
        factors_w = _load_scales(scales, rows, wanted, C, L, STEPS, LANE, GROUP)
    wait_for_inputs(PDL)

    factors = (0,)
    sums = (0,)
    if INPUT == "planes":
        words, factors = _load_planes(x, x_low, x_scales, C, L, STEPS, LANE)
    elif INPUT == "shuffled":
        words, factors = _quantize_shuffled(x, C, L, STEPS, LANE)
    else:
        words = _load_values(x, C, L, STEPS, LANE)
    if CODEC == "u4":
        sums = _sums_of(words, L, STEPS)

    top = tl.full((BN,), float("-inf"), tl.float32)
    top_ids = tl.zeros((BN,), tl.int32)
    for block in tl.range(first, last, num_stages=1):
        rows = _rows_of(block, N, BN, PAIRS)
        inside = block * step_rows + own < end
        next_rows = _rows_of(block + 1, N, BN, PAIRS)
        wanted = ((block + 1) * step_rows + own < end) & (block + 1 < last)
        next_tiles = _load_codes(codes, next_rows, wanted, C, L, STEPS, LANE, ITEMS)
        next_factors = factors_w
        if CODEC == "i8" or CODEC == "u4":
            next_factors = _load_scales(scales, next_rows, wanted, C, L, STEPS, LANE, GROUP)
        result = _product(tiles, factors_w, words, factors, sums, L, BN, STEPS, CODEC, GROUP)
        if BIAS:
            result += tl.load(bias + rows, mask=inside, other=0.0)
        if EPILOGUE == "gate":
            gate, up = tl.split(tl.reshape(result, (BN // 2, 2)))
            row = block * (BN // 2) + tl.arange(0, BN // 2)
            place = shuffled_place(row) if SHUFFLED else row
            tl.store(out + place, activate(gate, ACTIVATION) * up, mask=row < end)
        elif EPILOGUE == "activate":
            place = shuffled_place(rows) if SHUFFLED else rows
            tl.store(out + place, activate(result, ACTIVATION), mask=inside)
        elif EPILOGUE == "logits":
            result = result * multiplier
            if SOFTCAP:
                result = softcap * tanh(result / softcap)
            tl.store(out + rows, result, mask=inside)
            # A row that is not finite has to be seen: it wins as +inf.
            seen = tl.where(result == result, result, float("inf"))
            better = inside & (seen > top)
            top_ids = tl.where(better, rows, top_ids)
            top = tl.where(better, seen, top)
        else:
            tl.store(out + rows, result, mask=inside)
        tiles = next_tiles
        factors_w = next_factors
    if EPILOGUE == "logits":
        most = tl.max(top, 0)
        tl.store(best + cta, most)
        tl.store(best_ids + cta, tl.min(tl.where(top == most, top_ids, 2147483647), 0))


@dataclass(frozen=True, slots=True)
class Vector:
    """The input of a gemv in one of its forms."""

    form: Literal["planes", "shuffled", "values"]
    x: torch.Tensor
    """fp32 [C], or the high bytes int8 [C]."""
    low: torch.Tensor | None = None
    """int8 [C]."""
    scales: torch.Tensor | None = None
    """fp32 [C / 32]."""


@dataclass(frozen=True, slots=True)
class Logits:
    """What the head's epilogue does, and where it leaves the best token of each CTA."""

    multiplier: float
    softcap: float | None
    best: torch.Tensor
    """fp32 [at least `grid_of` the head]."""
    best_ids: torch.Tensor


Epilogue = Literal["store", "gate", "activate"]


def grid_of(matrix: Matrix, tile: Tile, epilogue: Epilogue | Logits, multiprocessors: int) -> tuple[int, int]:
    """(CTAs, blocks of rows)."""
    pairs = epilogue == "gate"
    blocks = -(-(matrix.rows // 2) // (tile.rows // 2)) if pairs else -(-matrix.rows // tile.rows)
    return min(blocks, tile.ctas_per_multiprocessor * multiprocessors), blocks


def gemv(
    matrix: Matrix,
    x: Vector,
    out: torch.Tensor,
    tile: Tile,
    *,
    multiprocessors: int,
    pdl: bool,
    epilogue: Epilogue | Logits = "store",
    activation: str = "silu",
    shuffled: bool = False,
) -> None:
    """Launch it. `out` fp32 [N] ([N / 2] of a gate), contiguous."""
    ctas, blocks = grid_of(matrix, tile, epilogue, multiprocessors)
    logits = epilogue if isinstance(epilogue, Logits) else None
    unused = out
    codes = matrix.codes
    planes = x.form == "planes"
    gemv_kernel[(ctas,)](
        x.x.view(torch.int32) if planes else x.x,
        x.low.view(torch.int32) if x.low is not None else unused,
        x.scales if x.scales is not None else unused,
        codes,
        matrix.scales if matrix.scales.numel() else unused,
        matrix.bias if matrix.bias is not None else unused,
        out,
        logits.best if logits is not None else unused,
        logits.best_ids if logits is not None else unused,
        matrix.rows,
        blocks,
        logits.multiplier if logits is not None else 1.0,
        (logits.softcap or 1.0) if logits is not None else 1.0,
        C=matrix.columns,
        L=tile.lanes,
        BN=tile.rows,
        CODEC=matrix.encoding.codec,
        GROUP=matrix.encoding.group_size,
        INPUT=x.form,
        EPILOGUE="logits" if logits is not None else epilogue,
        ACTIVATION=activation,
        BIAS=matrix.bias is not None,
        SOFTCAP=logits is not None and logits.softcap is not None,
        SHUFFLED=shuffled,
        LANE=LANE_COLUMNS[matrix.encoding.codec],
        ITEMS=16 // codes.element_size(),
        PDL=pdl,
        num_warps=tile.warps,
        launch_pdl=pdl,
    )


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """fp32 [C], the dequantized matrix fp32 [N, C] -> fp32 [N]."""
    y = weight.double() @ x.double()
    y = y if bias is None else y + bias.double()
    return y.float()


def shuffle(x: torch.Tensor) -> torch.Tensor:
    """fp32 [..., C] in order -> in shuffled order; its own inverse."""
    return x.reshape(*x.shape[:-1], -1, 4, 4).transpose(-1, -2).flatten(-3)
