"""Formats: how a weight matrix is stored in few bits, and exactly what weights the stored numbers mean.

`format.py` is the contract; `plain.py`, `affine.py` and `codebook.py` the formats; `stored.py` and
`ggml_blocks.py` those of checkpoints. A new format is registered here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from octavo.errors import InvalidParameterError, ModelFormatError
from octavo.quant.affine import INT4, INT8, LLM_INT8, Affine
from octavo.quant.codebook import NF4, Codebook
from octavo.quant.format import Format
from octavo.quant.logical_layout import REF1
from octavo.quant.plain import Plain
from octavo.quant.stored import split_stored, stored_format

__all__ = ["REF1", "format_from_manifest", "format_named", "split_stored", "stored_format"]

_NAMED: Mapping[str, Format] = {known.name: known for known in (INT8, LLM_INT8, INT4, NF4)}

_KINDS: Mapping[Any, Callable[..., Format]] = {"plain": Plain, "affine": Affine, "codebook": Codebook}


def format_named(name: str) -> Format:
    """The format a user names: int8, llm-int8, int4 or nf4.

    "auto" and "none" are no formats: they depend on the checkpoint (`octavo.weights.choose_formats`). Raises
    InvalidParameterError.
    """
    try:
        return _NAMED[name]
    except KeyError:
        raise InvalidParameterError(
            f"there is no weight format {name!r}",
            remedy=f"Use --quant with one of: auto, none, {', '.join(_NAMED)}.",
            parameter="quant",
        ) from None


def format_from_manifest(description: Mapping[str, Any]) -> Format:
    """The inverse of `Format.to_manifest`. Raises ModelFormatError where it describes no format."""
    fields = {key: value for key, value in description.items() if key != "kind"}
    try:
        return _KINDS[description["kind"]](**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFormatError(
            f"unknown weight format {dict(description)}",
            remedy="Remove the packed weights with: octavo cache prune --all",
        ) from error
