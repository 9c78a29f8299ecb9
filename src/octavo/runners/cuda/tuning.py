"""Finds the tiles of a model's batch-1 linears on the card at hand: each is tried in the whole step.

A product alone does not tell: kernels of a step overlap, and what one leaves in the caches the next one finds.
Shape letters: N output rows, C padded columns.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from octavo.models.spec import KV_PAGE_TOKENS, ModelSpec
from octavo.runners.base import RunnerConfig
from octavo.runners.cuda.decode import Card, DecodeStep, card_of
from octavo.runners.cuda.decode_attention import Sequences
from octavo.runners.cuda.device_model import DeviceModel, Matrix, load_model
from octavo.runners.cuda.graphs import Graphs
from octavo.runners.cuda.kv_cache import make_cache
from octavo.runners.cuda.tiles import LANE_COLUMNS, Key, Tile, key_of, tile_for
from octavo.weights import WeightStore

_PAGES = 16
_STEPS = 8
_ROUNDS = 3
_CTAS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
_MOST_WARPS = 48
"""Of a multiprocessor, or registers run out."""


def tune_model(
    spec: ModelSpec, weights: WeightStore, config: RunnerConfig, seconds: float
) -> tuple[str, dict[Key, Tile]]:
    """The card's name, and the fastest tile of each shape."""
    device = torch.device(config.device)
    compute_dtype, kv_dtype = getattr(torch, config.compute_dtype), getattr(torch, config.kv_dtype)
    with torch.cuda.device(device):
        model = load_model(spec, weights, _PAGES * KV_PAGE_TOKENS, device)
        return card_of(device).name, fastest_tiles(model, compute_dtype, kv_dtype, device, seconds)


@torch.inference_mode()
def fastest_tiles(
    model: DeviceModel,
    compute_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    device: torch.device,
    seconds: float,
) -> dict[Key, Tile]:
    """Of each shape, among those that `seconds` are enough for. `model` is on `device`, the current one."""
    timer = _StepTimer(model, compute_dtype, kv_dtype, device)
    found: dict[Key, Tile] = {}
    ends = time.monotonic() + seconds
    shapes = distinct_matrices(model)
    for index, matrix in enumerate(shapes):
        share = time.monotonic() + (ends - time.monotonic()) / (len(shapes) - index)
        found[key_of(matrix.encoding, matrix.rows, matrix.columns)] = _best(timer, matrix, found, share)
    return found


def distinct_matrices(model: DeviceModel) -> list[Matrix]:
    """One of each shape that a step multiplies with, those that take most of its time first."""
    parts = [part for linear in model.linears for part in linear.parts]
    found = {key_of(part.encoding, part.rows, part.columns): part for part in parts}
    return sorted(found.values(), key=lambda part: -part.codes.nbytes)


def candidates(matrix: Matrix, multiprocessors: int) -> Iterator[Tile]:
    """Tiles whose codes fit a thread's registers twice, and that leave no multiprocessor out."""
    lanes_of_row = matrix.columns // LANE_COLUMNS[matrix.encoding.codec]
    for lanes in (32, 64, 128, 256, 512):
        steps = -(-lanes_of_row // lanes)
        if lanes > max(32, 2 * lanes_of_row - 1) or steps > 5:
            continue
        for rows in (2, 4, 8, 16):
            warps = lanes // 32
            if not 8 <= rows * 4 * steps <= 48:
                continue
            blocks = -(-matrix.rows // rows)
            for each in _CTAS:
                if 4 <= each * warps <= _MOST_WARPS and each * multiprocessors < 2 * blocks:
                    yield Tile(lanes, rows, warps, each)


def _best(timer: _StepTimer, matrix: Matrix, found: dict[Key, Tile], ends: float) -> Tile:
    key = key_of(matrix.encoding, matrix.rows, matrix.columns)
    best = tile_for(timer.card.name, matrix.encoding, matrix.rows, matrix.columns, timer.card.tiles)
    least = timer.milliseconds(found)
    for tile in candidates(matrix, timer.card.multiprocessors):
        if time.monotonic() > ends:
            break
        taken = timer.milliseconds(found | {key: tile})
        if taken < least:
            best, least = tile, taken
    return best


class _StepTimer:
    """A decode step of one sequence, from half of its context on."""

    def __init__(
        self, model: DeviceModel, compute_dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device
    ) -> None:
        spec = model.spec
        self.card: Card = card_of(device)
        self._model = model
        self._dtype = compute_dtype
        groups = len(spec.kv_groups)
        self._caches = make_cache(spec, [_PAGES] * groups, kv_dtype, device)
        self._positions = torch.zeros(2, dtype=torch.int32, device=device)
        self._last_tokens = torch.zeros(2, dtype=torch.int32, device=device)
        pages = torch.arange(_PAGES, dtype=torch.int32, device=device).expand(2, -1).contiguous()
        slots = torch.zeros(1, dtype=torch.int32, device=device)
        self._sequences = Sequences(slots, self._positions, (pages,) * groups, 1)

    def milliseconds(self, tiles: dict[Key, Tile]) -> float:
        """Median of a step with these tiles before the user's and the measured ones."""
        step = DecodeStep(
            self._model,
            self._caches,
            self._sequences,
            self._last_tokens,
            context_tokens=_PAGES * KV_PAGE_TOKENS,
            compute_dtype=self._dtype,
            card=replace(self.card, tiles={**self.card.tiles, **tiles}),
        )
        graphs = Graphs(capturing=True)
        graphs.run("step", step.forward)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        taken: list[float] = []
        for _ in range(_ROUNDS + 1):  # the first one captures
            self._positions.fill_(_PAGES * KV_PAGE_TOKENS // 2)
            begin.record()
            for _ in range(_STEPS):
                graphs.run("step", step.forward)
            end.record()
            torch.cuda.synchronize()
            taken.append(begin.elapsed_time(end) / _STEPS)
        graphs.close()
        return sorted(taken[1:])[_ROUNDS // 2]
