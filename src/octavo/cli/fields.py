"""What a field of `Settings` or `SamplingParams` is called in each layer, and the type a user writes.

`max_new_tokens` is --max-new-tokens, OCTAVO_MAX_NEW_TOKENS, and the key max_new_tokens of octavo.toml.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any, Union, get_args, get_origin

VARIABLE_PREFIX = "OCTAVO_"


def flag_name(field: dataclasses.Field[Any]) -> str:
    return "--" + field.name.replace("_", "-")


def variable_name(field: dataclasses.Field[Any]) -> str:
    """A switch that is on by default is named by its off form, as its flag is: OCTAVO_NO_CACHE, --no-cache."""
    named: str | None = field.metadata.get("env")
    return named or f"{VARIABLE_PREFIX}{'NO_' if field.default is True else ''}{field.name.upper()}"


def is_negated(field: dataclasses.Field[Any]) -> bool:
    """True where the variable says the opposite of the field."""
    return field.default is True and "env" not in field.metadata


def bare_type(hint: Any) -> Any:
    """`X | None` -> X."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (each for each in get_args(hint) if each is not type(None))
    return hint
