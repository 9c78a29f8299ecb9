"""Tensors of a checkpoint that no parameter takes its values from: refused or said, never passed over in silence.

llama.cpp computes with whatever its architecture knows that a file holds, so in a GGUF such a tensor is arithmetic we
would leave out. transformers leaves out what its model has no place for, and says so; so do we.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from octavo.errors import UnsupportedConfigError
from octavo.models.parameters import Parameter
from octavo.models.spec import ModelSpec
from octavo.types import TensorNaming

_ROTARY = ("rotary_emb.inv_freq", "attn_rot_embd.weight")
"""Endings of rotary frequencies that old converters kept: they follow from the config."""
_TIED_HEAD = "lm_head.weight"
_NAMED = 3
"""How many a message names."""


def unread_tensors(
    spec: ModelSpec, parameters: Iterable[Parameter], naming: TensorNaming, tensors: Iterable[str]
) -> list[str]:
    """Names of the tensors that no parameter reads and that would change the result if one did, in order."""
    sources = {parameter.source for parameter in parameters}
    copies = (*_ROTARY, _TIED_HEAD) if spec.tied_head and naming == "huggingface" else _ROTARY
    return [name for name in tensors if name not in sources and not name.endswith(copies)]


def refuse_unread(unread: Sequence[str], family: str) -> None:
    """Raise UnsupportedConfigError, naming the first of them, if there are any."""
    if unread:
        raise UnsupportedConfigError(
            f"the file has {_listed(unread)}, which {family} is not known to compute with",
            remedy="Octavo refuses what it cannot compute exactly; choose a checkpoint without this feature.",
            key=unread[0],
        )


def unread_notices(unread: Sequence[str], family: str) -> tuple[str, ...]:
    if not unread:
        return ()
    return (f"the checkpoint has {_listed(unread)}, which {family} does not compute with: left unread",)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more tensors" if len(names) > _NAMED else ""
    return ("the tensor " if len(names) == 1 else "the tensors ") + ", ".join(names[:_NAMED]) + more
