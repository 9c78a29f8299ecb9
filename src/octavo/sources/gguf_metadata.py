"""The metadata of one GGUF architecture: typed values, and a record of which were asked for.

What they mean is gguf_architectures.py's and gguf_rope.py's work.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from octavo.errors import ModelFormatError, UnsupportedConfigError
from octavo.sources.files import FETCH_AGAIN
from octavo.sources.gguf import GGUFFile

_INERT = frozenset({"tensor_data_layout", "rope.scaling.finetuned", "vocab_size"})
_NEUTRAL: tuple[Any, ...] = (None, False, 0, "", [])
_ON = frozenset({"attention.causal", "expert_weights_norm"})
"""What every architecture here does: these change nothing where they are true, not where they are off."""


class MetadataReader:
    """The metadata of one architecture, with a record of the keys that were asked for."""

    def __init__(self, gguf: GGUFFile, architecture: str) -> None:
        self.gguf = gguf
        self.architecture = architecture
        self._taken: set[str] = set()

    def raw(self, key: str) -> Any:
        self._taken.add(key)
        return self.gguf.metadata.get(f"{self.architecture}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.raw(key)
        value = default if value is None else value
        if isinstance(value, list):
            raise self.unsupported(key, "differs between layers")
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise self.malformed(key, value, "a whole number from 1 to 2,147,483,647")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The shortest decimal that is the stored float32: 1e-05, not 9.999999747378752e-06."""
        value = self.raw(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.malformed(key, value, "a finite number")
        return float(shortest(value))

    def has_tensor(self, name: str) -> bool:
        return name in self.gguf.tensors

    def vocab_size(self) -> int:
        """The width of the logits: rows of the token table, which may exceed the tokenizer's tokens."""
        table = self.gguf.tensors.get("token_embd.weight")
        if table is None:
            raise ModelFormatError(
                f"{self.gguf.path} has no token_embd.weight: it holds no language model, or a part of one",
                remedy="Name the file with the model's weights.",
            )
        return table.shape[0]

    def finish(self) -> None:
        prefix = self.architecture + "."
        for name, value in self.gguf.metadata.items():
            key = name.removeprefix(prefix)
            neutral = (True,) if key in _ON else _NEUTRAL
            if name.startswith(prefix) and key not in self._taken | _INERT and value not in neutral:
                raise self.unsupported(key, "is not a key this architecture is known to compute with")

    def unsupported(self, key: str, why: str) -> UnsupportedConfigError:
        name = f"{self.architecture}.{key}"
        return UnsupportedConfigError(
            f"{self.gguf.path}: {name} = {self.gguf.metadata.get(name)!r:.80} {why}",
            remedy="Octavo refuses what it cannot compute exactly; choose a model without this feature.",
            key=name,
        )

    def malformed(self, key: str, value: object, expected: str) -> ModelFormatError:
        found = "is missing" if value is None else f"is {value!r:.80}"
        return ModelFormatError(
            f"{self.gguf.path}: {self.architecture}.{key} {found}; expected {expected}", remedy=FETCH_AGAIN
        )


def shortest(value: Any) -> Any:
    """A float32 as the shortest decimal that rounds to it; other values as they are."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
