"""Positions from a config: rotary embedding with its scaling, fixed once at load, and the longest context.

Takes both spellings: `rope_parameters` (transformers 5, also one object a layer type) and `rope_theta` with
`rope_scaling` (before). The formulas are rope_scaling.py's. Kinds and parameters we do not know are refused
by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from octavo.errors import ModelFormatError, UnsupportedConfigError
from octavo.models.config_reader import ConfigReader
from octavo.models.rope_scaling import SCALINGS, ScalingInputs
from octavo.models.spec import Rope, RopeKind

_READ_HERE = frozenset(
    {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
)
_REACHES_FURTHER = ("dynamic", "yarn")
"""Scalings that are added to a config whose length stays what it was: it then reaches `factor` times as far."""
_MAX_TOKENS = 1 << 31


@dataclass(frozen=True, slots=True)
class Positions:
    """What a config says of positions, for layers that share a rope."""

    config: ConfigReader
    key: str
    """Where the parameters stand in the config."""
    parameters: Mapping[str, Any]
    kind: Any
    """A key of `SCALINGS`, once `rope` has accepted it."""
    base: float
    partial: float
    """Share of a head's dims that is rotated."""
    max_position_tokens: int
    original_tokens: int
    """The length the model was trained on before its context was extended."""

    def rope(self, head_dim: int) -> Rope:
        """Raises UnsupportedConfigError for a kind or a parameter we do not know, ModelFormatError for a bad
        value."""
        if not isinstance(self.kind, str) or self.kind not in SCALINGS:
            raise UnsupportedConfigError(
                f"rope type {self.kind!r:.80} is not supported (known: {', '.join(SCALINGS)})",
                remedy="Choose a checkpoint with another rope scaling.",
                key=self.key,
            )
        rotary_dim = int(head_dim * self.partial)
        if rotary_dim not in range(2, head_dim + 1, 2):
            raise ModelFormatError(
                f"rope rotates {rotary_dim} dims of each head; expected an even number from 2 to {head_dim}",
                remedy="Compare the checkpoint's config.json with the original.",
            )
        inputs = ScalingInputs(
            base=self.base,
            rotary_dim=rotary_dim,
            max_position_tokens=self.max_position_tokens,
            original_tokens=self.original_tokens,
            asked_tokens=self.config.context_tokens,
        )
        values = {key: value for key, value in self.parameters.items() if key not in _READ_HERE}
        reader = self.config.beneath(self.key, values)
        with np.errstate(all="ignore"):
            scaled = SCALINGS[self.kind](inputs, reader)
            computed = np.append(scaled.frequencies, scaled.attention_factor).astype(np.float32)
        reader.finish()
        if not np.isfinite(computed).all():
            raise ModelFormatError(
                f"rope frequencies of type {self.kind!r} with base {self.base:g} are not finite",
                remedy="Compare the checkpoint's config.json with the original.",
            )
        kind: RopeKind = self.kind  # type: ignore[assignment]  # a key of SCALINGS is one
        frequencies = tuple(float(f) for f in scaled.frequencies.astype(np.float32))
        return Rope(kind, self.base, rotary_dim, frequencies, scaled.attention_factor, scaled.reason)

    @property
    def max_context_tokens(self) -> int:
        """The longest context: what the config promises, or what its scaling was added to reach."""
        if self.kind not in _REACHES_FURTHER:
            return self.max_position_tokens
        factor = self.config.beneath(self.key, self.parameters).positive("factor", 1.0)
        reached = factor * (self.original_tokens if self.kind == "yarn" else self.max_position_tokens)
        return max(self.max_position_tokens, int(min(reached, _MAX_TOKENS)))


def read_positions(
    config: ConfigReader, *, base: float = 10000.0, max_position: int = 2048, partial: float | None = None
) -> Positions:
    """Of a config with one rope for all its layers.

    The arguments are the family's defaults; `partial` None: the family rotates whole heads, and a config that
    says otherwise is refused.
    """
    key, parameters = _parameters(config)
    return _positions(config, key, parameters, ("rope_theta", base), max_position, partial)


def read_positions_by_type(
    config: ConfigReader, *, bases: Mapping[str, tuple[str | None, float]], max_position: int
) -> dict[str, Positions]:
    """Of a config with a rope for each type of layer, by type.

    `bases`: type -> (the key that held its base before `rope_parameters`, if any, and the base by default).
    Scaling in the old spelling is for full attention only.
    """
    if config.has("rope_scaling") and config.has("rope_parameters"):
        raise config.unsupported("rope_scaling", "stands beside rope_parameters")
    key, parameters = _parameters(config)
    by_type = {layer_type: parameters.get(layer_type) or {} for layer_type in bases}
    if not any(layer_type in parameters for layer_type in bases):
        by_type["full_attention"] = parameters
    elif parameters.keys() - bases.keys() or not all(isinstance(p, Mapping) for p in by_type.values()):
        raise config.unsupported(key, f"does not name the types of layers: {', '.join(bases)}")
    return {
        layer_type: _positions(config, f"{key}.{layer_type}", by_type[layer_type], base, max_position, None)
        for layer_type, base in bases.items()
    }


def _parameters(config: ConfigReader) -> tuple[str, Mapping[str, Any]]:
    """The object with the parameters, and its key. transformers, too, prefers the old spelling."""
    scaling, parameters = config.raw("rope_scaling"), config.raw("rope_parameters")
    key = "rope_scaling" if scaling else "rope_parameters"
    found = scaling or parameters or {}
    if not isinstance(found, Mapping):
        raise config.unsupported(key, "is not an object")
    return key, found


def _positions(
    config: ConfigReader,
    key: str,
    parameters: Mapping[str, Any],
    base: tuple[str | None, float],
    max_position: int,
    partial: float | None,
) -> Positions:
    reader = config.beneath(key, parameters)
    old_key, base_default = base
    config.raw("partial_rotary_factor")
    place = reader if reader.has("partial_rotary_factor") else config
    share = place.positive("partial_rotary_factor", partial or 1.0)
    if partial is None and share != 1.0:
        raise place.unsupported(
            "partial_rotary_factor", "rotates a part of each head, which this family does not"
        )
    most = config.integer("max_position_embeddings", max_position)
    return Positions(
        config=config,
        key=key,
        parameters=parameters,
        kind=parameters.get("rope_type", parameters.get("type", "default")),
        base=reader.positive(
            "rope_theta", base_default if old_key is None else config.positive(old_key, base_default)
        ),
        partial=share,
        max_position_tokens=most,
        original_tokens=reader.integer("original_max_position_embeddings", most),
    )
