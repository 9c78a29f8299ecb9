"""The modules of a quantized checkpoint: several tensors that are one weight, found and checked.

What the tensors mean is each method's work. Shape letters: N output rows, K input columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from octavo.errors import ModelFormatError
from octavo.quant.checkpoint.packed_tensor import PackedTensor
from octavo.quant.format import Format
from octavo.quant.plain import from_bf16
from octavo.types import TensorRef

_REMEDY = "The download may be incomplete, or the config of another model: fetch the model again."


@dataclass(frozen=True, slots=True)
class Module:
    """One module's tensors, by what follows its name: "qweight", "weight.absmax", ..."""

    name: str
    parts: Mapping[str, TensorRef]

    def part(self, suffix: str, dtypes: str, dimensions: int | None = None) -> TensorRef:
        """The tensor of that suffix, which must be of one of `dtypes` (separated by spaces)."""
        found = self.parts.get(suffix)
        if found is None:
            raise self.malformed(f"has no {suffix}")
        if found.dtype not in dtypes.split():
            raise self.malformed(f"has {suffix} of type {found.dtype}, not {dtypes.replace(' ', ' or ')}")
        if dimensions is not None and len(found.shape) != dimensions:
            raise self.malformed(f"has {suffix} {list(found.shape)}; expected {dimensions} dimensions")
        return found

    def expect(self, suffix: str, shape: tuple[int, ...]) -> None:
        """Raises ModelFormatError where the part has another shape."""
        found = self.parts[suffix].shape
        if found != shape:
            raise self.malformed(f"has {suffix} {list(found)}; expected {list(shape)}")

    def malformed(self, what: str) -> ModelFormatError:
        return ModelFormatError(f"the quantized module {self.name} {what}", remedy=_REMEDY)

    def floats(self, suffix: str) -> np.ndarray:
        """The values of a float part: float16 as stored, bfloat16 and float32 as float32, all finite."""
        part = self.parts[suffix]
        values = part.read()
        values = from_bf16(values) if part.dtype == "bf16" else values
        if not np.isfinite(values).all():
            raise self.malformed(f"has a {suffix} that is not finite")
        return values


class Modules:
    """The checkpoint's tensors while a method reads them: what it packs takes the place of its parts."""

    def __init__(self, tensors: Mapping[str, TensorRef]) -> None:
        self.tensors: dict[str, TensorRef] = dict(tensors)
        self.packed: list[PackedTensor] = []
        self.notices: list[str] = []

    def holding(self, marker: str, suffixes: str) -> Iterator[Module]:
        """Every module with a tensor named `marker`, with those of its parts that `suffixes` lists."""
        ending = "." + marker
        for name in [name for name in self.tensors if name.endswith(ending)]:
            module = name.removesuffix(ending)
            wanted = {suffix: f"{module}.{suffix}" for suffix in (marker, *suffixes.split())}
            yield Module(
                module, {part: self.tensors[full] for part, full in wanted.items() if full in self.tensors}
            )

    def put(
        self,
        module: Module,
        shape: tuple[int, int],
        format: Format,
        load: Callable[[], dict[str, np.ndarray]],
    ) -> None:
        """Replace the module's parts by its weight."""
        for part in module.parts.values():
            del self.tensors[part.name]
        name = f"{module.name}.weight"
        nbytes = sum(part.nbytes for part in module.parts.values())
        packed = PackedTensor(name, shape, nbytes, format, load)
        self.tensors[name] = packed
        self.packed.append(packed)
