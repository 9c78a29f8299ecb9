"""What a field of `Settings` or `SamplingParams` is called in each layer, and the type a user writes.

`max_new_tokens` is --max-new-tokens, OCTAVO_MAX_NEW_TOKENS, and the key max_new_tokens of octavo.toml.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any, Union, get_args, get_origin

VARIABLE_PREFIX = "OCTAVO_"


def said_fields(cls: type) -> tuple[dataclasses.Field[Any], ...]:
    """The fields that can be said in words: all but those for Python alone."""
    return tuple(field for field in dataclasses.fields(cls) if not field.metadata.get("python"))


def flag_name(field: dataclasses.Field[Any]) -> str:
    named: str | None = field.metadata.get("flag")
    return named or "--" + field.name.replace("_", "-")


def variable_name(field: dataclasses.Field[Any]) -> str:
    """A switch that is on by default is named by its off form, as its flag is: OCTAVO_NO_CACHE, --no-cache."""
    named: str | None = field.metadata.get("env")
    return named or f"{VARIABLE_PREFIX}{'NO_' if field.default is True else ''}{field.name.upper()}"


def is_negated(field: dataclasses.Field[Any]) -> bool:
    """True where the variable says the opposite of the field."""
    return field.default is True and "env" not in field.metadata


def bare_type(hint: Any) -> Any:
    """`X | None` -> X; of several, the one that is written as text."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    several = [each for each in get_args(hint) if each is not type(None)]
    return several[0] if len(several) == 1 else str
