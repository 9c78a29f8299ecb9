"""A checkpoint that says its head is the token table, and has a head of other numbers all the same: that one is meant.

So transformers reads it, too: fine-tuning tools train a head and leave the config as it was. Copies of the table count
as the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from octavo.models.parameters import Parameter
from octavo.models.spec import ModelSpec
from octavo.types import TensorRef

_ROWS = 1024
"""Compared at a time: heads that differ do so in the first."""


def has_own_head(table: Parameter, head: Parameter, tensors: Mapping[str, TensorRef]) -> bool:
    """Whether the head's tensor is there and is no copy of the table's."""
    ours, theirs = tensors.get(table.source), tensors.get(head.source)
    if ours is None or theirs is None:
        return False
    if (ours.dtype, ours.shape, ours.nbytes) != (theirs.dtype, theirs.shape, theirs.nbytes):
        return True
    first, second = ours.read(), theirs.read()
    blocks = (slice(at, at + _ROWS) for at in range(0, len(first), _ROWS))
    return not all(np.array_equal(first[rows], second[rows]) for rows in blocks)


def own_head_notices(spec: ModelSpec, config: Mapping[str, Any]) -> tuple[str, ...]:
    text = config.get("text_config")
    said = config.get(
        "tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, Mapping) else None
    )
    if spec.tied_head or said is not True:
        return ()
    return (
        "the config says that the head is the token table, but the checkpoint has another head, which is used",
    )
