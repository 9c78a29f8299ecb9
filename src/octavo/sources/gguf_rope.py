"""Rope scaling of a GGUF file in Hugging Face's words: `rope.scaling.*`, and the tensors of rope factors.

llama.cpp's converter writes Llama 3's scaling as one divisor a frequency, and LongRoPE's two lists as two
tensors; none of them is a parameter of the model.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from octavo.errors import ModelFormatError
from octavo.sources.files import FETCH_AGAIN
from octavo.sources.gguf_metadata import MetadataReader, shortest

_FACTORS = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_FACTORS = frozenset({_FACTORS, _LONG, _SHORT})
"""Names of the tensors that are read here and nowhere else."""
_YARN = {"ext_factor": 1.0, "attn_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0}


def rope_scaling(
    reader: MetadataReader,
    *,
    base: float,
    pairs: int,
    context_tokens: int,
    writes_attention_factor: bool = False,
) -> dict[str, Any] | None:
    """`rope_scaling` of config.json, or None; kind "linear" is llama.cpp's default.

    `pairs` is the number of frequencies. `writes_attention_factor`: the converter of this architecture puts
    Hugging Face's attention_factor, as it is, under rope.scaling.attn_factor.
    """
    kind = reader.raw("rope.scaling.type") or "linear"
    factor = reader.number("rope.scaling.factor", 0.0) or reader.number("rope.scale_linear", 0.0)
    original = reader.integer("rope.scaling.original_context_length", context_tokens)
    attention_factor = reader.number("rope.scaling.attn_factor", 1.0)
    yarn = {key: reader.number(f"rope.scaling.yarn_{key}", default) for key, default in _YARN.items()}
    scaled = kind != "none" and factor not in (0.0, 1.0)
    tables = [name for name in (_FACTORS, _LONG, _SHORT) if reader.has_tensor(name)]
    if tables and scaled:
        raise reader.unsupported("rope.scaling.factor", f"stands beside a tensor {tables[0]}")
    if _LONG in tables or _SHORT in tables:
        return {
            "rope_type": "longrope",
            "long_factor": _divisors(reader, _LONG, pairs).tolist(),
            "short_factor": _divisors(reader, _SHORT, pairs).tolist(),
            "original_max_position_embeddings": original,
            "attention_factor": attention_factor,
        }
    if attention_factor != 1.0 and not (kind == "yarn" and writes_attention_factor):
        raise reader.unsupported("rope.scaling.attn_factor", "is not 1")
    if tables:
        return _from_factors(_divisors(reader, _FACTORS, pairs), base, context_tokens)
    if not scaled:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise reader.unsupported("rope.scaling.type", "is a rope scaling that cannot be read from GGUF")
    for key in ("ext_factor", "attn_factor"):
        if yarn.pop(key) != 1.0:
            raise reader.unsupported(f"rope.scaling.yarn_{key}", "is not 1")
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original} | yarn
    return scaling | ({"attention_factor": attention_factor} if writes_attention_factor else {})


def _divisors(reader: MetadataReader, name: str, pairs: int) -> np.ndarray:
    """float64 [pairs]: the shortest decimals of the stored float32 values."""
    path, tensor = reader.gguf.path, reader.gguf.tensors.get(name)
    if tensor is None:
        raise ModelFormatError(f"{path} lacks the tensor {name} that goes with its other", remedy=FETCH_AGAIN)
    if tensor.dtype != "f32" or tensor.shape != (pairs,):
        raise ModelFormatError(
            f"{path}: {name} is {tensor.dtype} of shape {tensor.shape}; expected f32 of ({pairs},)",
            remedy=FETCH_AGAIN,
        )
    factors = np.array([shortest(float(value)) for value in tensor.read()])
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise ModelFormatError(f"{path}: {name} has values that are no divisors", remedy=FETCH_AGAIN)
    return factors


def _from_factors(factors: np.ndarray, base: float, context_tokens: int) -> dict[str, Any]:
    """Llama 3's scaling if the factors are those llama.cpp's converter writes for it, else the factors.

    All Llama 3 models have the same parameters but for the factor, which is the largest divisor. Others
    are said as longrope with one list for both lengths, which divides the frequencies in the same way.
    """
    pairs = len(factors)
    wavelengths = 2 * math.pi * base ** (np.arange(pairs) / pairs)
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    factor = float(factors.max())
    # 1e-4, because the converter computes in float32, whose rounding grows with the square of the factor.
    kept = np.clip((8192 / wavelengths - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    if np.allclose(factors, 1 / ((1 - kept) / factor + kept), rtol=1e-4, atol=0):
        return {"rope_type": "llama3", "factor": factor} | llama3
    return {
        "rope_type": "longrope",
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "original_max_position_embeddings": context_tokens,
        "factor": 1.0,
        "attention_factor": 1.0,
    }
