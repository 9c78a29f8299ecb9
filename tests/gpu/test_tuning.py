"""Tuning on a card: a tile for each shape of a model, which its steps then take and still compute the same with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from octavo.quant.affine import INT8
from octavo.runners.cuda.kind import CudaRunnerKind
from octavo.runners.cuda.user_tiles import read_user_tiles, write_user_tiles

pytestmark = pytest.mark.gpu


def test_every_shape_gets_a_tile(models: ModuleType, tmp_path: Path) -> None:
    # Not at the top: where there is no card, another folder's tests choose the interpreter before this import.
    from octavo.runners.cuda.tuning import tune_model

    layer = models.layer(models.attention(head_dim=32, rope=models.rope(16)), models.DenseMLP(96, "silu"))
    spec = models.model(layer, layer, hidden_size=64)
    config = replace(
        models.runner_config(spec),
        device="cuda:0",
        compute_dtype="bfloat16",
        kv_dtype="bfloat16",
        threads=None,
    )
    weights = models.make_tiny(spec, INT8).open(CudaRunnerKind().layout)
    card, tiles = tune_model(spec, weights, config, 20.0)
    assert card == torch.cuda.get_device_name()
    assert len(tiles) >= 4
    path = tmp_path / "tiles.json"
    write_user_tiles(path, card, tiles)
    assert read_user_tiles(path, card) == tiles
