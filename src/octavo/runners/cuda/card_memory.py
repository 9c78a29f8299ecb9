"""What is said where the card has no room: what was needed, what was free, and what to do about it."""

from __future__ import annotations

from octavo.dtypes import kv_vector_bytes
from octavo.errors import NotEnoughMemoryError
from octavo.models.spec import KV_PAGE_TOKENS, ModelSpec
from octavo.runners.base import RunnerConfig
from octavo.runners.cuda.limits import LIBRARY_BYTES, activation_bytes
from octavo.units import readable_bytes

_REMEDY = (
    "Use a smaller --context, fewer --max-sequences or --quant int4, or close what else uses the card "
    "(nvidia-smi lists it)."
)


def no_room_to_load(
    spec: ModelSpec, config: RunnerConfig, weights_bytes: int, free_bytes: int
) -> NotEnoughMemoryError:
    """`free_bytes`: of the device, before anything was taken."""
    parts = {
        "weights": weights_bytes,
        "kv": kv_bytes(spec, config),
        "activations": activation_bytes(spec, config),
        "libraries": LIBRARY_BYTES,
    }
    needed = sum(parts.values())
    named = ", ".join(f"{part} {readable_bytes(nbytes)}" for part, nbytes in parts.items())
    return NotEnoughMemoryError(
        f"loading needs {readable_bytes(needed)} of {config.device} memory ({named}); {readable_bytes(free_bytes)} "
        "were free",
        remedy=_REMEDY,
        needed_bytes=needed,
        available_bytes=free_bytes,
    )


def no_room_to_run(spec: ModelSpec, config: RunnerConfig, free_bytes: int) -> NotEnoughMemoryError:
    """For a step: its buffers were planned for, and somebody else took the memory since."""
    needed = activation_bytes(spec, config)
    return NotEnoughMemoryError(
        f"a step needs up to {readable_bytes(needed)} of {config.device} memory beside weights and KV pages; "
        f"{readable_bytes(free_bytes)} are free: something else took it since the model was loaded",
        remedy=_REMEDY,
        needed_bytes=needed,
        available_bytes=free_bytes,
    )


def kv_bytes(spec: ModelSpec, config: RunnerConfig) -> int:
    """Of all pages, and of the spare one that each group has."""
    total = 0
    for group, pages in zip(spec.kv_groups, config.kv_pages, strict=True):
        mixers = [spec.layers[i].mixer for i in group.layers]
        token = sum(2 * m.kv_heads * kv_vector_bytes(config.kv_dtype, m.head_dim) for m in mixers)
        total += (pages + 1) * KV_PAGE_TOKENS * token
    return total
