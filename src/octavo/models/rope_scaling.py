"""The rope scalings: from a base to inverse frequencies and an attention factor, one function a kind.

Formulas are those of transformers' `modeling_rope_utils`, in float32 where it computes in float32. Where they
depend on the length of the sequence they are fixed for one context. Reading configs is rope.py's work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from octavo.models.config_reader import ConfigReader
from octavo.settings import DEFAULT_CONTEXT_TOKENS


@dataclass(frozen=True, slots=True)
class ScalingInputs:
    base: float
    rotary_dim: int
    max_position_tokens: int
    """What the config promises without any scaling of its own."""
    original_tokens: int
    """The length the model was trained on before its context was extended."""
    asked_tokens: int | None
    """The context the user asked for."""

    @property
    def exponents(self) -> np.ndarray:
        """float32 [rotary_dim / 2]: 0, 2, ... over rotary_dim."""
        return np.arange(0, self.rotary_dim, 2, dtype=np.float32) / np.float32(self.rotary_dim)

    @property
    def frequencies(self) -> np.ndarray:
        """float32 [rotary_dim / 2], unscaled."""
        inverted: np.ndarray = np.float32(1.0) / self.powers
        return inverted

    @property
    def powers(self) -> np.ndarray:
        raised: np.ndarray = np.power(np.float32(self.base), self.exponents)
        return raised


@dataclass(frozen=True, slots=True)
class Scaled:
    frequencies: np.ndarray
    """float32 [rotary_dim / 2]; not yet known to be finite."""
    attention_factor: float = 1.0
    reason: str = ""
    """`Rope.reason`."""


def default(inputs: ScalingInputs, parameters: ConfigReader) -> Scaled:
    return Scaled(inputs.frequencies)


def linear(inputs: ScalingInputs, parameters: ConfigReader) -> Scaled:
    return Scaled(inputs.frequencies / np.float32(parameters.positive("factor")))


def dynamic(inputs: ScalingInputs, parameters: ConfigReader) -> Scaled:
    """NTK-aware scaling, which transformers computes anew as a sequence grows past the config's length."""
    factor, most = parameters.positive("factor"), inputs.max_position_tokens
    tokens = max(inputs.asked_tokens or most, most)
    grown = np.float64(factor * tokens / most - (factor - 1))
    base = inputs.base * grown ** np.float64(inputs.rotary_dim / max(1, inputs.rotary_dim - 2))
    frequencies = np.float32(1.0) / np.power(np.float32(base), inputs.exponents)
    return Scaled(
        frequencies, reason=f"fixed for {tokens:,} tokens, where the config's own length is {most:,}"
    )


def llama3(inputs: ScalingInputs, parameters: ConfigReader) -> Scaled:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between blended."""
    factor, original = parameters.positive("factor"), inputs.original_tokens
    low, high = parameters.positive("low_freq_factor"), parameters.positive("high_freq_factor")
    frequencies = inputs.frequencies
    wavelengths = 2 * math.pi / frequencies
    blend = (original / wavelengths - low) / (high - low)
    smooth = (1 - blend) * frequencies / factor + blend * frequencies
    scaled = np.where(wavelengths > original / low, frequencies / factor, smooth)
    return Scaled(np.where(wavelengths < original / high, frequencies, scaled))


def yarn(inputs: ScalingInputs, parameters: ConfigReader) -> Scaled:
    """YaRN: frequencies that turn less than `beta_slow` times in the original length are divided by `factor`,
    those that turn more than `beta_fast` times kept, a linear ramp between."""
    original, dim = inputs.original_tokens, inputs.rotary_dim
    factor = parameters.positive("factor", inputs.max_position_tokens / original)
    mscale = parameters.number("mscale", 0.0), parameters.number("mscale_all_dim", 0.0)
    given = parameters.optional_positive("attention_factor")
    if given is not None:
        attention_factor = given
    elif all(mscale):
        attention_factor = float(np.float64(_magnitude(factor, mscale[0])) / _magnitude(factor, mscale[1]))
    else:
        attention_factor = _magnitude(factor, 1.0)

    def dimension_turning(times: float) -> np.float64:
        turns = np.log(np.float64(original / (times * 2 * math.pi)))
        return np.float64(dim * turns / (2 * np.log(np.float64(inputs.base))))

    low = dimension_turning(parameters.positive("beta_fast", 32))
    high = dimension_turning(parameters.positive("beta_slow", 1))
    if parameters.flag("truncate", True):
        low, high = np.floor(low), np.ceil(high)
    low, high = np.maximum(low, 0), np.minimum(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1).astype(np.float32)
    interpolated = np.float32(1.0) / (np.float32(factor) * inputs.powers)
    return Scaled(interpolated * ramp + inputs.frequencies * (1 - ramp), attention_factor)


def longrope(inputs: ScalingInputs, parameters: ConfigReader) -> Scaled:
    """LongRoPE: a divisor for each frequency, of one list up to the original length and of another beyond it."""
    original, pairs = inputs.original_tokens, inputs.rotary_dim // 2
    ratio = parameters.positive("factor", inputs.max_position_tokens / original)
    tokens = inputs.asked_tokens or min(inputs.max_position_tokens, DEFAULT_CONTEXT_TOKENS)
    long, short = parameters.positives("long_factor", pairs), parameters.positives("short_factor", pairs)
    attention_factor = parameters.optional_positive("attention_factor")
    if attention_factor is None:
        grown = np.log(np.float64(ratio)) / np.log(np.float64(original))
        attention_factor = float(np.sqrt(1 + grown)) if ratio > 1 else 1.0
    kind, side = ("long", "beyond") if tokens > original else ("short", "within")
    divisors = np.array(long if tokens > original else short, np.float32)
    frequencies = np.float32(1.0) / (divisors * inputs.powers)
    reason = f"{kind} factors, as a context of {tokens:,} tokens is {side} the original {original:,}"
    return Scaled(frequencies, attention_factor, reason)


SCALINGS: Mapping[str, Callable[[ScalingInputs, ConfigReader], Scaled]] = {
    "default": default,
    "linear": linear,
    "dynamic": dynamic,
    "llama3": llama3,
    "yarn": yarn,
    "longrope": longrope,
}


def _magnitude(scale: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(scale) + 1.0 if scale > 1 else 1.0
