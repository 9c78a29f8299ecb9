"""What is said of a loaded model, the same through the Python API and through the server.

Facts are for `LLM.info` and /v1/models; notices are for the user's eyes. Decides and measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from octavo.loading import LoadedBackend, PlannedModel


def load_facts(model: PlannedModel) -> Mapping[str, Any]:
    """What runs, where and how."""
    plan = model.plan
    return {
        "quant": _quant_name(model),
        "quantized_as": list(model.source.quantized_as),
        "device": plan.config.device,
        "device_reason": model.device_reason,
        "runner": plan.runner,
        "dtype": plan.dtypes.compute,
        "kv_dtype": plan.dtypes.kv,
    }


def load_notices(model: PlannedModel, about_text: Sequence[str], loaded: LoadedBackend) -> tuple[str, ...]:
    """What the user should know of the load, each once. `about_text`: the frontend's notices."""
    every = (*model.source.notices, *model.plan.warnings, *about_text, *loaded.notices)
    return tuple(dict.fromkeys(every))


def _quant_name(model: PlannedModel) -> str:
    """The matrices' formats, the one with most bytes first: "int8", "q4_1 + q8_0"."""
    roles = {p.name: p.role for p in model.parameters}
    matrices = {f.name for name, f in model.plan.formats.items() if roles[name] != "vector"}
    return " + ".join(part.format for part in model.plan.weights if part.format in matrices)
