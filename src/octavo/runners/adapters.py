"""Whether a LoRA adapter fits a model: every runner asks this before it takes one.

Shape letters: N output rows, K input columns, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from octavo.errors import IncompatibleModelError
from octavo.runners.base import Adapter
from octavo.weights import StoredBundle


def check_adapter(name: str, adapter: Adapter, linears: Mapping[str, tuple[int, ...]]) -> None:
    """`linears`: parameter name -> [N, K] of what the runner can add to.

    Raises IncompatibleModelError, naming the parameter.
    """
    for parameter, (a, b) in adapter.addends.items():
        if parameter not in linears:
            raise IncompatibleModelError(
                f"adapter {name!r} changes {parameter}, which this model and runner have no addend for",
                remedy="Merge the adapter into the model's weights, or leave that module out of it.",
            )
        rows, columns = linears[parameter]
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != columns or b.shape != (rows, a.shape[0]):
            raise IncompatibleModelError(
                f"adapter {name!r} has {b.shape} times {a.shape} for {parameter}, which is {rows} x {columns}",
                remedy="Use an adapter that was trained on this model.",
            )
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise IncompatibleModelError(
                f"adapter {name!r} has values for {parameter} that are not finite",
                remedy="The adapter is broken: fetch it again, or train it again.",
            )


def linears_of(weights: Mapping[str, StoredBundle]) -> dict[str, tuple[int, ...]]:
    """Name -> [N, K] of the matrices that take an addend: all but the table, routers and experts."""
    return {
        parameter.name: parameter.shape
        for bundle in weights.values()
        for parameter in bundle.parameters
        if parameter.role == "matrix" and ".experts." not in parameter.name
    }
