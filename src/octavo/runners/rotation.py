"""How much memory the rotary tables of runners that keep them take."""

from __future__ import annotations

from octavo.models.spec import ModelSpec


def rotation_bytes(spec: ModelSpec, context_tokens: int) -> int:
    """Of the tables of cosines and sines, fp32 [context, rotary_dim / 2] each, one pair for each different rope."""
    ropes = {layer.mixer.rope for layer in spec.layers}
    return sum(4 * context_tokens * rope.rotary_dim for rope in ropes if rope is not None)
