"""The one dtype policy: what a load computes in, keeps its KV cache in, and accumulates in.

Storage formats are `octavo.quant`'s. Every contradiction between the dtype asked for and the device or the
model is found here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from octavo.errors import InvalidParameterError
from octavo.settings import DtypeName, KVDtypeName

Dtype = Literal["float32", "bfloat16", "float16"]
KVDtype = Literal["float32", "bfloat16", "float16", "int8"]

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

KV_SCALE_BYTES = 4
"""Of an int8 key or value of one head: what its codes are multiplied with, float32."""

_EXCEEDS_FLOAT16 = frozenset({"gemma2", "gemma3", "gemma3_text", "glm4"})
"""Families whose residual stream passes float16's 65,504 on ordinary text; vLLM refuses the same ones."""


@dataclass(frozen=True, slots=True)
class DtypePolicy:
    compute: Dtype
    """Activations and, where a runner dequantizes, weights."""
    kv: KVDtype
    reason: str
    """Both choices in words for the user."""
    accumulate: Literal["float32"] = "float32"
    """Sums inside matrix products, norms and softmax; logits are float32 too."""


def kv_vector_bytes(kv: str, head_dim: int) -> int:
    """Of one token's key, or value, in one head."""
    return head_dim + KV_SCALE_BYTES if kv == "int8" else head_dim * DTYPE_BYTES[kv]


def resolve_dtypes(
    *,
    dtype: DtypeName,
    device: str,
    runner: str,
    family: str,
    bfloat16: bool,
    kv_dtype: KVDtypeName = "auto",
) -> DtypePolicy:
    """The dtypes of `runner` on `device` (cpu, cuda:N or mps) for a model of `family`.

    `bfloat16`: the device computes it in hardware (NVIDIA: compute capability 8.0 on); not asked of the CPU,
    where torch's bfloat16 is always right and halves the memory. Raises InvalidParameterError naming `dtype`
    and what it contradicts.
    """
    if dtype == "auto":
        compute, why = _default(device, family, bfloat16)
    else:
        _refuse_contradiction(dtype, device, family, bfloat16)
        compute, why = dtype, "as asked"
    kv, kv_why = _kv(compute, runner, kv_dtype)
    return DtypePolicy(compute, kv, f"computes in {compute} ({why}), KV cache in {kv} ({kv_why})")


def _default(device: str, family: str, bfloat16: bool) -> tuple[Dtype, str]:
    if device == "cpu":
        return "float32", "the CPU gains no speed from 16 bits, only rounding"
    if device == "mps":
        return "float32", "16-bit types differ between Apple chips, and this device only runs the reference"
    if bfloat16:
        return "bfloat16", "float32's range at half the bytes"
    if family in _EXCEEDS_FLOAT16:
        return "float32", f"{device} has no bfloat16, and {family} exceeds float16's range"
    return "float16", f"{device} has no bfloat16"


def _refuse_contradiction(dtype: Dtype, device: str, family: str, bfloat16: bool) -> None:
    computes_bfloat16 = bfloat16 or device == "cpu"
    use = "float32"
    if dtype == "float16" and family in _EXCEEDS_FLOAT16:
        other, against = "the model", f"{family} models exceed float16's range (65,504)"
        use = "bfloat16" if computes_bfloat16 else "float32"
    elif dtype == "float16" and device == "cpu":
        other, against = "device cpu", "CPUs emulate float16, slower than float32"
    elif dtype == "bfloat16" and not computes_bfloat16:
        other, against = f"device {device}", "it has no bfloat16 arithmetic"
    else:
        return
    raise InvalidParameterError(
        f"--dtype {dtype} contradicts {other}: {against}",
        remedy=f"Use --dtype {use}, or leave it to --dtype auto.",
        parameter="dtype",
    )


def _kv(compute: Dtype, runner: str, asked: KVDtypeName) -> tuple[KVDtype, str]:
    if asked == "int8":
        return "int8", "as asked"
    if runner == "reference":
        return compute, "the reference rounds nothing it need not"
    if compute == "float32":
        return "float16", "half the bytes, and more precise than bfloat16 at the size of keys and values"
    return compute, "the compute type"
