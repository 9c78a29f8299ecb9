"""What a plan says: the reason of each choice, the warning of a tight one, and the refusal of what cannot fit.

Every number comes from `octavo.plan`; nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

from octavo.devices import DeviceChoice
from octavo.errors import NotEnoughMemoryError
from octavo.load_plan import Pool, StoredWeights
from octavo.models.spec import ModelSpec
from octavo.units import readable_bytes

MOST_NAMED = 3
"""Processes that a sentence names."""


def device_reason(device: DeviceChoice) -> str:
    return f"device {device.device}: {device.reason}"


def runner_reason(name: str, *, packed: int, own: int, mapped: int) -> str:
    """`packed`, `own`, `mapped`: bytes of the packed model, of the runner's copy, and of what it reads in place."""
    size = f"{readable_bytes(packed)} packed"
    if own > mapped:
        return f"runner {name}: holds weights of its own, {readable_bytes(own)} made from {size}"
    return f"runner {name}: reads the weights where they are, {size}"


def context_reason(asked: int | None, most: int, default: int, fits: int) -> str:
    if asked is not None:
        return f"{asked:,} as asked (the model's limit is {most:,})"
    chosen = min(most, default, fits)
    # `fits` is not looked for beyond the model's limit: where another number binds, it is none of memory's.
    binding = (
        "all that fits"
        if fits < min(most, default)
        else "and more would fit"
        if fits > chosen
        else "which fits"
    )
    return f"{chosen:,} of the model's {most:,} (default {default:,}), {binding}"


def rope_reasons(spec: ModelSpec) -> Iterator[str]:
    """Of scalings that depend on the length, and are fixed for all of it."""
    for rope in dict.fromkeys(layer.mixer.rope for layer in spec.layers):
        if rope is not None and rope.reason:
            yield f"rope {rope.kind}: {rope.reason}"


def sequences_reason(sequences: int, contexts: Fraction, *, asked: int | None) -> str:
    """`contexts`: full contexts that the KV memory holds."""
    if sequences == 1:
        return "sequences: one at a time, as asked"
    if asked is None:
        return f"sequences: up to {sequences} together, sharing the KV memory of one full context"
    if contexts == sequences:
        return f"sequences: up to {sequences} together as asked, each with the KV memory of a full context"
    return (
        f"sequences: up to {sequences} together as asked, sharing the KV memory of {float(contexts):.1f} full "
        "contexts, which is what fits"
    )


def weights_reason(part: StoredWeights) -> str:
    sizes = f"{readable_bytes(part.packed_bytes)} packed, {readable_bytes(part.file_bytes)} in the file"
    return f"{part.tensors} {'tensor' if part.tensors == 1 else 'tensors'} as {part.format}: {sizes}"


def tight_warning(pool: Pool) -> str:
    left = pool.available_bytes - pool.needed_bytes
    return (
        f"{pool.name} memory is tight: {readable_bytes(pool.needed_bytes)} of {readable_bytes(pool.available_bytes)} "
        f"available will be used, which leaves {readable_bytes(left)}{_others(pool)}: a smaller --context leaves more"
    )


def refusal(what: str, pools: Sequence[Pool], remedies: Sequence[str]) -> NotEnoughMemoryError:
    """`what` needs more than there is; `remedies` are flags that would help, each by itself."""
    short = max(pools, key=lambda pool: pool.needed_bytes - pool.usable_bytes)
    if short.load_peak_bytes > short.running_bytes:
        most = "most of it while packing the weights"
    else:
        most = ", ".join(f"{part} {readable_bytes(nbytes)}" for part, nbytes in short.parts.items())
    return NotEnoughMemoryError(
        f"{what} needs {readable_bytes(short.needed_bytes)} of {short.name} memory ({most}); "
        f"{readable_bytes(short.usable_bytes)} may be used of {readable_bytes(short.available_bytes)} available"
        f"{_others(short)}",
        remedy=f"Try {' or '.join(remedies)}." if remedies else "Free memory, or choose a smaller model.",
        needed_bytes=short.needed_bytes,
        available_bytes=short.usable_bytes,
    )


def _others(pool: Pool) -> str:
    """Who holds the rest of a card, for the end of a sentence."""
    if not pool.others:
        return ""
    named = [
        f"pid {each.pid}" + ("" if each.used_bytes is None else f" {readable_bytes(each.used_bytes)}")
        for each in pool.others[:MOST_NAMED]
    ]
    more = len(pool.others) - len(named)
    return f"; other processes hold memory too ({', '.join(named)}{f', {more} more' if more else ''})"
