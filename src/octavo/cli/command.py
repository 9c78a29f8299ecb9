"""Commands that take flags of simple types as they are.

typer makes a pydantic validator of every flag, given or not, which with pydantic's import took a tenth of the time to
the first token. What this module does not plainly recognize goes that way, and with it all complaints.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, get_args

from typer import Context
from typer.core import TyperCommand, TyperGroup


class Command(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return _with_simple_values(super().get_params(ctx))


class Group(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return _with_simple_values(super().get_params(ctx))


def _with_simple_values(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        if not parameter.required and "process_value" not in vars(parameter):
            parameter.process_value = functools.partial(_process, parameter, parameter.process_value)
    return parameters


def _process(parameter: Any, otherwise: Callable[[Context, Any], Any], context: Context, value: Any) -> Any:
    if value is None:
        absent = () if parameter.multiple or parameter.nargs == -1 else None
        return absent if parameter.callback is None else parameter.callback(context, parameter, absent)
    descriptor = parameter.type_descriptor
    if isinstance(value, str) and parameter.callback is None and not descriptor.is_ranged:
        plain = _plain(descriptor.annotation, value)
        if plain is not None:
            return plain
    return otherwise(context, value)


_LONGEST = 18
"""Characters of a number that is plain: Python has its own limit for longer ones."""


def _plain(kind: Any, text: str) -> str | int | float | None:
    """The value a text stands for, where that is beyond doubt."""
    if kind is str or text in get_args(kind):
        return text
    if len(text) > _LONGEST or not text.isascii() or not text.replace(".", "", 1).isdigit():
        return None
    return float(text) if kind is float else int(text) if kind is int and text.isdigit() else None
