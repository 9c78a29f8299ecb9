"""Rotary embedding from a config: frequencies fixed once, with their scaling, at load.

Formulas are those of transformers' `modeling_rope_utils`, computed in float32 as there. Kinds we cannot
say yet are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from octavo.errors import ModelFormatError, UnsupportedConfigError
from octavo.models.config_reader import ConfigReader
from octavo.models.spec import Rope, RopeKind


def read_rope(config: ConfigReader, head_dim: int, default_base: float) -> Rope:
    """The rope of a config that has one for all layers.

    Takes `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before), and
    `partial_rotary_factor`.
    """
    parameters: Any = config.raw("rope_parameters") or config.raw("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise config.unsupported("rope_scaling", "is not an object")
    base = parameters.get("rope_theta", config.raw("rope_theta", default_base))
    partial = parameters.get("partial_rotary_factor", config.raw("partial_rotary_factor", 1.0))
    rotary_dim = int(head_dim * _number("partial_rotary_factor", partial))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    return make_rope(kind, _number("rope_theta", base), rotary_dim, parameters)


def make_rope(kind: object, base: float, rotary_dim: int, parameters: Mapping[str, Any]) -> Rope:
    """Raises UnsupportedConfigError for a kind or a parameter we do not know, ModelFormatError for a bad value."""
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise UnsupportedConfigError(
            f"rope type {kind!r:.80} is not supported (known: {', '.join(_SCALINGS)})",
            remedy="Choose a checkpoint with another rope scaling.",
            key="rope_scaling",
        )
    if rotary_dim < 2 or rotary_dim % 2:
        raise ModelFormatError(
            f"rope rotates {rotary_dim} dims of each head; expected an even number of at least 2",
            remedy="Compare the checkpoint's config.json with the original.",
        )
    scale, known = _SCALINGS[kind]
    inert = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    for key, value in parameters.items():
        if key not in inert and key not in known and value is not None:
            raise UnsupportedConfigError(
                f"rope type {kind!r} has a parameter {key!r} = {value!r} that is not known to compute with",
                remedy="Choose a checkpoint with another rope scaling.",
                key=f"rope_scaling.{key}",
            )
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    with np.errstate(all="ignore"):
        frequencies = np.float32(1.0) / np.power(np.float32(base), exponents)
        scaled = scale(frequencies, {key: _number(key, parameters.get(key)) for key in known})
    if not np.isfinite(scaled).all():
        raise ModelFormatError(
            f"rope frequencies of type {kind!r} with base {base:g} are not finite",
            remedy="Compare the checkpoint's config.json with the original.",
        )
    rope_kind: RopeKind = kind  # type: ignore[assignment]  # a key of _SCALINGS is one
    return Rope(rope_kind, base, rotary_dim, tuple(float(f) for f in scaled.astype(np.float32)))


def _default(frequencies: np.ndarray, _: Mapping[str, float]) -> np.ndarray:
    return frequencies


def _linear(frequencies: np.ndarray, parameters: Mapping[str, float]) -> np.ndarray:
    return frequencies / np.float32(parameters["factor"])


def _llama3(frequencies: np.ndarray, parameters: Mapping[str, float]) -> np.ndarray:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between blended."""
    factor = parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    original = parameters["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    blend = (original / wavelengths - low) / (high - low)
    smooth = (1 - blend) * frequencies / factor + blend * frequencies
    scaled = np.where(wavelengths > original / low, frequencies / factor, smooth)
    return np.where(wavelengths < original / high, frequencies, scaled)


_SCALINGS = {
    "default": (_default, ()),
    "linear": (_linear, ("factor",)),
    "llama3": (
        _llama3,
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    ),
}


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ModelFormatError(
            f"rope parameter {key} is {value!r:.80}; expected a number above 0",
            remedy="Compare the checkpoint's config.json with the original.",
        )
    return float(value)
