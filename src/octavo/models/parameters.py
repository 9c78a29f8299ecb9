"""Parameters of a `ModelSpec` by name, and where each one's values come from in a checkpoint.

Names: `embedding.weight`, `head.weight` (unless tied), `head.bias`, `final_norm.weight|bias`, and for layer i
`layers.{i}.` + `mixer.{q,k,v,o}.weight|bias`, `mixer.{q,k}_norm.weight`, `ffn.{gate,up,down}.weight|bias` or
`ffn.router.weight` and `ffn.experts.{e}.{gate,up,down}.weight`, and
`norms.{pre_mixer,post_mixer,pre_ffn,post_ffn}.weight|bias`.
Shape letters: N output rows, K input columns, H heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Parameter:
    """One logical tensor and the source tensor (or a part of it) that holds it.

    The row transforms keep every group along K intact, so they are exact on quantized tensors too.
    """

    name: str
    shape: tuple[int, ...]
    """[N, K] of a matrix, [N] of a vector."""
    role: Literal["matrix", "embedding", "router", "vector"]
    """matrix: multiplied with activations, packed in the format asked for; embedding: the token table (also
    the head where tied), packed likewise; router: a matrix kept as fp32, since rounding it does not blur a
    result but sends tokens to other experts; vector: norms and biases, kept as fp32."""
    source: str
    """Name in the checkpoint."""
    rows: tuple[int, int] | None = None
    """[first, last) rows of the source tensor (fused qkv or gate_up, an expert of a stack); None: all. Of a
    tensor with three dimensions, rows are counted through the first two."""
    unpermute_heads: int | None = None
    """GGUF stores Llama's q and k, and Cohere any, with each head's rotary pairs adjacent: rows
    (h, pair, half) -> (h, half, pair) for this many heads. None: rows are in order."""
    add: float = 0.0
    """Added to a vector's values: -1 where GGUF stores Gemma's 1 + w and the spec says offset 1."""

    def __post_init__(self) -> None:
        if self.add and self.role != "vector":
            raise ValueError("only vectors take an addend")
