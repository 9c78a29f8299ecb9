"""Layout `ref-1`: every parameter by itself, its arrays as its format defines them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.models.parameters import Parameter
from octavo.quant.format import Bundle, Format, Packed

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class LogicalLayout:
    """One bundle a parameter, of the parameter's name; the arrays keep the names of the format."""

    id: str = "ref-1"

    def bundles(self, parameters: Sequence[Parameter]) -> tuple[Bundle, ...]:
        return tuple(Bundle(parameter.name, (parameter,)) for parameter in parameters)

    def arrange(self, bundle: Bundle, packed: Sequence[tuple[Format, Packed]]) -> dict[str, np.ndarray]:
        ((_, arrays),) = packed
        return dict(arrays)


REF1 = LogicalLayout()
