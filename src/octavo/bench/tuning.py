"""`octavo bench --tune`: finds tiles for a model's linears on its CUDA device and keeps them for every later load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from octavo.errors import UsageError
from octavo.loading import plan_model, stored_weights
from octavo.settings import Settings
from octavo.types import Progress


@dataclass(frozen=True, slots=True)
class Tuned:
    shapes: int
    path: Path


def tune_tiles(settings: Settings, seconds: float, progress: Progress | None = None) -> Tuned:
    """Raises UsageError where the model does not run on the CUDA runner, and what loading raises."""
    planned = plan_model(settings, progress=progress)
    config = planned.plan.config
    if planned.plan.runner != "cuda":
        raise UsageError(
            f"only the CUDA runner has tiles to tune, this model runs on the {planned.plan.runner} runner",
            remedy="Add --device cuda, or leave --tune out.",
        )
    from octavo.runners.cuda.tuning import tune_model
    from octavo.runners.cuda.user_tiles import user_tiles_path, write_user_tiles

    path = user_tiles_path()
    weights = stored_weights(planned, progress)
    try:
        card, tiles = tune_model(planned.spec, weights, config, seconds)
    finally:
        weights.close()
    write_user_tiles(path, card, tiles)
    return Tuned(len(tiles), path)
