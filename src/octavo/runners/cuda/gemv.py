"""One activation vector times a matrix: the batch-1 linear, at the speed memory gives the weights.

A CTA walks consecutive blocks of BN rows. Its first tile is in registers before it waits for the kernel before,
the next one is loaded while a tile is multiplied. A lane owns 16 bytes of a row; integer codes, and tables looked up
by byte permutes, meet 16-bit fixed-point activations (`fixed_point`) in dp4a, so no weight is converted; floats are
multiplied in fp32.

Contract: x [C] and the matrix [N, C] of layout `cuda-b64-1` -> fp32 [N] (+ bias). Input forms:
`planes`: high and low bytes [C] and scales [C / 32], made by a norm; `shuffled`: fp32 [C] with every block of
16 columns transposed as 4 x 4 (`shuffled_place`), quantized here, a scale a lane; `normed`: the same, times a gain and
over the root of its mean square (rms norm), which the rows' results are divided by; `values`: fp32 [C] in order,
for weights that are floats. Epilogues: `store`; `gate`: rows n and n + N / 2 -> act(gate) * up; `activate`: act(y);
`add`: out += multiplier * y; all but `store` in shuffled order where SHUFFLED; `logits`: multiplier, softcap, and the
best token of each CTA. Where OUT_C is not 0, `gate` and `activate` leave planes of OUT_C columns: a CTA then walks the
rows of whole blocks of 32 results.
Shape letters: N output rows, K columns, C padded columns, L lanes at once, BN rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl

from octavo.runners.cuda.activation import activate, tanh
from octavo.runners.cuda.code_tables import CODE_TABLES
from octavo.runners.cuda.device_model import Matrix
from octavo.runners.cuda.fixed_point import Planes, store_planes
from octavo.runners.cuda.gemv_inputs import (
    load_gains,
    load_planes,
    load_values,
    quantize_shuffled,
    shuffled_place,
    sums_of,
)
from octavo.runners.cuda.gemv_scales import group_numbers, load_scales
from octavo.runners.cuda.ptx import dp4a, permute_bytes, release_dependents, wait_for_inputs
from octavo.runners.cuda.tiles import LANE_COLUMNS, Tile
from octavo.runners.cuda.unpack import e4m3_value


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
def _look_up(tile, block: tl.constexpr, TABLE: tl.constexpr, FIRST: tl.constexpr):
    """Bytes of a table for four nibbles: entries 0..7 and 8..15 by their low bits, one of the two by the high bit."""
    codes = (tile & 0x77777777) >> (16 * block)
    low = permute_bytes(TABLE[FIRST], TABLE[FIRST + 1], codes)
    high = permute_bytes(TABLE[FIRST + 2], TABLE[FIRST + 3], codes)
    return permute_bytes(low, high, (((tile >> 1) & 0x44444444) | 0x32103210) >> (16 * block))


@triton.jit
def _bytes_of(tile, block: tl.constexpr, CODEC: tl.constexpr, TABLE: tl.constexpr):
    """The signed bytes of four columns in words of codes, of one of a lane's blocks of 16 columns."""
    if CODEC == "i8" or CODEC == "i8m":
        return tile
    elif CODEC == "u4":
        return (tile >> (4 * block)) & 0x0F0F0F0F
    elif CODEC == "i4":  # 16 times the code: its sign is the byte's
        return (tile << (4 - 4 * block)) & -0x0F0F0F10
    else:
        return _look_up(tile, block, TABLE, 0)


@triton.jit
def _product(
    tiles, raw, words, factors, sums,
    L: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr, CODEC: tl.constexpr, GROUP: tl.constexpr,
    LANE: tl.constexpr, EACH: tl.constexpr, TABLE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One block of rows times x: fp32 [BN]. For floats `words` holds x.

    Of a table of two planes, the product of both low bytes is left out: 2^-16 of the largest.
    """
    total = tl.zeros((L, BN), tl.float32)
    PLAIN: tl.constexpr = CODEC == "f16" or CODEC == "bf16" or CODEC == "f32"
    ROWS: tl.constexpr = GROUP == 0 and EACH == 1
    HALVES: tl.constexpr = 2 if GROUP == 16 and LANE == 32 else 1
    BLOCKS: tl.constexpr = LANE // 16 // HALVES
    for half in tl.static_range(STEPS * HALVES):
        if PLAIN:
            total += tl.sum(tiles[half // HALVES].to(tl.float32) * words[half // HALVES], 2)
        else:
            if CODEC == "e4m3":
                part = tl.zeros((L, BN, 4), tl.float32)
                for byte in tl.static_range(4):
                    part += e4m3_value((tiles[half // HALVES] >> (8 * byte)) & 255) * words[half * 4 + byte]
            else:
                high = tl.zeros((L, BN, 4), tl.int32)
                low = high
                for block in tl.static_range(BLOCKS):
                    x_high = words[(half * BLOCKS + block) * 2]
                    codes = _bytes_of(tiles[half // HALVES], half % HALVES * BLOCKS + block, CODEC, TABLE)
                    high = dp4a(codes, x_high, high)
                    low = dp4a(codes, words[(half * BLOCKS + block) * 2 + 1], low)
                    if len(TABLE) == 8:
                        low = dp4a(
                            _look_up(tiles[half // HALVES], half % HALVES * BLOCKS + block, TABLE, 4),
                            x_high,
                            low,
                        )
                part = high * 256 + low
            product = tl.sum(part, 2).to(tl.float32)
            if not ROWS:
                scale, least = group_numbers(raw, half, EACH)
                product *= scale * UNIT
                if EACH == 2:
                    product += sums[half].to(tl.float32) * least
            if CODEC != "e4m3":
                product *= factors[half // HALVES]
            total += product
    result = tl.sum(total, 0)
    if ROWS and not PLAIN:
        result = result * (raw[0].to(tl.float32) * UNIT)
    return result


@triton.jit(do_not_specialize=["N", "blocks"])
def gemv_kernel(
    x, x_low, x_scales, codes, scales, bias, out, out_scales, best, best_ids, N, blocks, multiplier, softcap, eps,
    K: tl.constexpr, C: tl.constexpr, L: tl.constexpr, BN: tl.constexpr, CODEC: tl.constexpr,
    GROUP: tl.constexpr, TABLE: tl.constexpr, UNIT: tl.constexpr, INPUT: tl.constexpr, EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SHUFFLED: tl.constexpr,
    OUT_C: tl.constexpr, LANE: tl.constexpr, ITEMS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """See the module. Grid: any number of CTAs up to `blocks` = ceil(N / BN). `normed`: x_scales is the gain."""
    release_dependents(PDL)
    cta = tl.program_id(0)
    ctas = tl.num_programs(0)
    STEPS: tl.constexpr = (C // LANE + L - 1) // L
    PAIRS: tl.constexpr = EPILOGUE == "gate"
    PLAIN: tl.constexpr = CODEC == "f16" or CODEC == "bf16" or CODEC == "f32"
    EACH: tl.constexpr = 2 if CODEC == "u4" or CODEC == "i8m" else 1
    HALVES: tl.constexpr = 2 if GROUP == 16 and LANE == 32 else 1
    # Pairs end where gate's rows do; their partners are then in range too.
    end = N // 2 if PAIRS else N
    step_rows: tl.constexpr = BN // 2 if PAIRS else BN
    own = tl.arange(0, BN) // 2 if PAIRS else tl.arange(0, BN)
    # Blocks of rows that one CTA has to walk together.
    UNIT_BLOCKS: tl.constexpr = 32 // step_rows if OUT_C else 1
    units = (blocks + UNIT_BLOCKS - 1) // UNIT_BLOCKS
    first = (cta * units) // ctas * UNIT_BLOCKS
    last = ((cta + 1) * units) // ctas * UNIT_BLOCKS

    rows = _rows_of(first, N, BN, PAIRS)
    wanted = first * step_rows + own < end
    tiles = _load_codes(codes, rows, wanted, C, L, STEPS, LANE, ITEMS)
    raw = (0,)
    if not PLAIN:
        raw = load_scales(scales, rows, wanted, C, L, STEPS, LANE, GROUP, EACH)
    gains = (0,)
    if INPUT == "normed":
        gains = load_gains(x_scales, C, L, STEPS, LANE)
    wait_for_inputs(PDL)

    factors = (0,)
    sums = (0,)
    norm = 1.0
    if INPUT == "planes":
        words, factors = load_planes(x, x_low, x_scales, C, L, STEPS, LANE)
    elif INPUT == "values":
        words = load_values(x, C, L, STEPS, LANE, CODEC == "e4m3")
    else:
        words, factors, squares = quantize_shuffled(x, gains, C, L, STEPS, LANE, INPUT == "normed")
        if INPUT == "normed":
            norm = tl.rsqrt(tl.sum(squares) / K + eps)
    if EACH == 2:
        sums = sums_of(words, L, STEPS * HALVES, LANE // 16 // HALVES)

    top = tl.full((BN,), float("-inf"), tl.float32)
    top_ids = tl.zeros((BN,), tl.int32)
    kept = tl.zeros((UNIT_BLOCKS, step_rows), tl.float32)
    for block in tl.range(first, last, num_stages=1):
        rows = _rows_of(block, N, BN, PAIRS)
        inside = block * step_rows + own < end
        next_rows = _rows_of(block + 1, N, BN, PAIRS)
        wanted = ((block + 1) * step_rows + own < end) & (block + 1 < last)
        next_tiles = _load_codes(codes, next_rows, wanted, C, L, STEPS, LANE, ITEMS)
        next_raw = raw
        if not PLAIN:
            next_raw = load_scales(scales, next_rows, wanted, C, L, STEPS, LANE, GROUP, EACH)
        result = _product(
            tiles, raw, words, factors, sums, L, BN, STEPS, CODEC, GROUP, LANE, EACH, TABLE, UNIT
        )
        if INPUT == "normed":
            result *= norm
        if BIAS:
            result += tl.load(bias + rows, mask=inside, other=0.0)
        if EPILOGUE == "gate" or EPILOGUE == "activate":
            if PAIRS:
                gate, up = tl.split(tl.reshape(result, (BN // 2, 2)))
                value = activate(gate, ACTIVATION) * up
            else:
                value = activate(result, ACTIVATION)
            row = block * step_rows + tl.arange(0, step_rows)
            if OUT_C:
                turn = block % UNIT_BLOCKS
                mine = tl.arange(0, UNIT_BLOCKS)[:, None] == turn
                kept = tl.where(mine, tl.where(row < end, value, 0.0)[None, :], kept)
                if turn == UNIT_BLOCKS - 1:
                    unit = block // UNIT_BLOCKS + tl.arange(0, 1)
                    column = unit[:, None] * 32 + tl.arange(0, 32)[None, :]
                    store_planes(out, out_scales, unit, column, tl.reshape(kept, (1, 32)), OUT_C, 32)
            else:
                tl.store(out + (shuffled_place(row) if SHUFFLED else row), value, mask=row < end)
        elif EPILOGUE == "add":
            place = out + (shuffled_place(rows) if SHUFFLED else rows)
            tl.store(place, tl.load(place, mask=inside, other=0.0) + result * multiplier, mask=inside)
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
        raw = next_raw
    if EPILOGUE == "logits":
        most = tl.max(top, 0)
        tl.store(best + cta, most)
        tl.store(best_ids + cta, tl.min(tl.where(top == most, top_ids, 2147483647), 0))


@dataclass(frozen=True, slots=True)
class Vector:
    """The input of a gemv in one of its forms."""

    form: Literal["planes", "shuffled", "normed", "values"]
    x: torch.Tensor
    """fp32 [C], or the high bytes int8 [C]."""
    low: torch.Tensor | None = None
    """int8 [C]."""
    scales: torch.Tensor | None = None
    """fp32 [C / 32]; of `normed` the norm's gain, fp32 [C] shuffled."""
    norm_width: int = 1
    """K of `normed`."""
    eps: float = 0.0


@dataclass(frozen=True, slots=True)
class Logits:
    """What the head's epilogue does, and where it leaves the best token of each CTA."""

    multiplier: float
    softcap: float | None
    best: torch.Tensor
    """fp32 [at least `grid_of` the head]."""
    best_ids: torch.Tensor


@dataclass(frozen=True, slots=True)
class Add:
    """out += multiplier * y."""

    multiplier: float


Epilogue = Literal["store", "gate", "activate"] | Add | Logits


BLOCK_COLUMNS = 32
"""Of planes that a gate leaves."""


def grid_of(
    matrix: Matrix, tile: Tile, epilogue: Epilogue, multiprocessors: int, *, planes: bool = False
) -> tuple[int, int]:
    """(CTAs, blocks of rows). `planes`: the results are left in them."""
    pairs = epilogue == "gate"
    blocks = -(-(matrix.rows // 2) // (tile.rows // 2)) if pairs else -(-matrix.rows // tile.rows)
    units = -(-blocks * (tile.rows // 2 if pairs else tile.rows) // BLOCK_COLUMNS) if planes else blocks
    return min(units, tile.ctas_per_multiprocessor * multiprocessors), blocks


def leaves_planes(results: int, multiprocessors: int) -> bool:
    """Whether a gate leaves planes: two CTAs a multiprocessor, one for each block of 32 results, read too slowly."""
    return results // BLOCK_COLUMNS >= 3 * multiprocessors


def gemv(
    matrix: Matrix,
    x: Vector,
    out: torch.Tensor | Planes,
    tile: Tile,
    *,
    multiprocessors: int,
    pdl: bool,
    epilogue: Epilogue = "store",
    activation: str = "silu",
    shuffled: bool = False,
) -> None:
    """Launch it. `out` fp32 [N] ([N / 2] of a gate), contiguous; `shuffled` where the next linear is to quantize it.

    Or planes [1, 2, C] in blocks of 32 columns, of `gate` and `activate`; a tile has at most 32 results then.
    """
    planes_out = out if isinstance(out, Planes) else None
    y = out.pairs if isinstance(out, Planes) else out
    ctas, blocks = grid_of(matrix, tile, epilogue, multiprocessors, planes=planes_out is not None)
    logits = epilogue if isinstance(epilogue, Logits) else None
    unused = y
    codes, codec = matrix.codes, matrix.encoding.codec
    planes = x.form == "planes"
    table, unit = CODE_TABLES.get(codec, ((), 1.0))
    gemv_kernel[(ctas,)](
        x.x.view(torch.int32) if planes else x.x,
        x.low.view(torch.int32) if x.low is not None else unused,
        x.scales if x.scales is not None else unused,
        codes,
        matrix.scales if matrix.scales.numel() else unused,
        matrix.bias if matrix.bias is not None else unused,
        y,
        unused if planes_out is None else planes_out.scales,
        logits.best if logits is not None else unused,
        logits.best_ids if logits is not None else unused,
        matrix.rows,
        blocks,
        epilogue.multiplier if isinstance(epilogue, Add | Logits) else 1.0,
        (logits.softcap or 1.0) if logits is not None else 1.0,
        x.eps,
        K=x.norm_width,
        C=matrix.columns,
        L=tile.lanes,
        BN=tile.rows,
        CODEC=codec,
        GROUP=matrix.encoding.group_size,
        TABLE=table,
        UNIT=unit,
        INPUT=x.form,
        EPILOGUE=epilogue if isinstance(epilogue, str) else "add" if logits is None else "logits",
        ACTIVATION=activation,
        BIAS=matrix.bias is not None,
        SOFTCAP=logits is not None and logits.softcap is not None,
        SHUFFLED=shuffled,
        OUT_C=0 if planes_out is None else planes_out.columns,
        LANE=LANE_COLUMNS[codec],
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
