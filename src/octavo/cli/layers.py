"""Reads what was said in OCTAVO_* variables and in octavo.toml.

Every field is a variable and a key of its name: a top-level key for the first class (`Settings`), a key of
`[sampling]` for the second (`SamplingParams`), of `[serve]` for the third (`ServerSettings`). Which layer wins is
`octavo.cli.configuration`'s work.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from octavo.cli.fields import VARIABLE_PREFIX, is_negated, said_fields, variable_name
from octavo.errors import UsageError
from octavo.server.settings import ServerSettings

_NOT_SETTINGS = ("OCTAVO_DEBUG", "OCTAVO_REQUIRE_KERNELS", "OCTAVO_API_KEY", "OCTAVO_ADMIN_KEY")
_FOR_TESTS = "OCTAVO_TEST_"
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://\S+:\d+")
"""What Kubernetes puts into NAME_PORT of every container for a Service called NAME."""
_MORE_OF_A_LINK = re.compile(r"OCTAVO_SERVICE_(HOST|PORT\w*)|OCTAVO_PORT_\d+_(TCP|UDP|SCTP)\w*")
"""What comes with it."""
_SAMPLING = "sampling"
_ALIASES = "models"
_SERVE = "serve"
_FALLBACK = "fallback"


@dataclasses.dataclass(frozen=True, slots=True)
class Said:
    """A value and where it was said, in words for the user."""

    value: Any
    origin: str


Layer = Mapping[str, Said]
"""Field name -> what was said, over the fields of the dataclasses (whose names never clash)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Alias:
    """`[models.NAME]`: what holds when the user asks for the model NAME."""

    layer: Layer
    fallback: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    """What one octavo.toml says."""

    layer: Layer
    aliases: Mapping[str, Alias]
    serving: Layer = dataclasses.field(default_factory=dict)
    """`[serve]`"""


def read_environment(*classes: type) -> tuple[Layer, tuple[str, ...]]:
    """What the variables say, and a notice for each variable that is no setting.

    An empty variable says nothing. Raises InvalidParameterError where a value has the wrong type.
    """
    fields = {variable_name(field): field for cls in classes for field in said_fields(cls)}
    present = [name for name in os.environ if name.startswith(VARIABLE_PREFIX)]
    linked = tuple(name for name in present if name in fields and _SERVICE_LINK.fullmatch(os.environ[name]))
    for name in linked:
        del fields[name]
    notices = tuple(
        f"{name} is {os.environ[name]}, which Kubernetes sets for a Service of this name, and was ignored: "
        "rename the Service, or set enableServiceLinks: false"
        for name in linked
    )
    notices += tuple(
        f"{name} is not a setting, and was ignored{_meant(name, fields)}"
        for name in present
        if name not in (*fields, *linked, *_NOT_SETTINGS)
        and not name.startswith(_FOR_TESTS)
        and not (linked and _MORE_OF_A_LINK.fullmatch(name))
    )
    if not any(os.environ[name] for name in present if name in fields):
        return {}, notices
    from pydantic import ValidationError

    from octavo.cli import schema

    try:
        found = schema.given(schema.variables(fields, classes)())
    except ValidationError as error:
        first: Any = error.errors(include_url=False)[0]
        variable = first["loc"][0]
        first |= {"input": os.environ[variable], "loc": (fields[variable].name,)}
        raise schema.explain(first, variable, "the environment, or unset it", ()) from error
    layer = {}
    for variable, field in fields.items():
        if field.name in found:
            value = found[field.name]
            layer[field.name] = Said(not value if is_negated(field) else value, variable)
    return layer, notices


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return f": did you mean {close[0]}?" if close else ""


def read_file(path: Path, settings: type, sampling: type, serving: type = ServerSettings) -> File:
    """What an octavo.toml says; nothing where there is none.

    Raises UsageError where it is not TOML or has an unknown key, InvalidParameterError where a value has
    the wrong type.
    """
    import tomllib

    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return File({}, {})
    except (OSError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise UsageError(
            f"cannot read {path}: {error}", remedy=f"Correct {path}, or move it away."
        ) from error
    from pydantic import ValidationError

    from octavo.cli import schema

    sampled = schema.table(sampling)
    nested = {_SAMPLING: (sampled, sampled())}
    alias = schema.table(settings, **nested, **{_FALLBACK: (str | None, None)})
    served = schema.table(serving)
    tables = {**nested, _SERVE: (served, served()), _ALIASES: (dict[str, alias], {})}  # type: ignore[valid-type]
    whole = schema.table(settings, **tables)
    try:
        found = schema.strict(whole, data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        known = {name: schema.names(cls) for name, cls in ((_SAMPLING, sampling), (_SERVE, serving))}
        raise _explain(first, path, schema.names(settings), known) from error
    return File(
        _layer(found, str(path)),
        {
            name: Alias(_layer(each, f"[{_ALIASES}.{name}] in {path}"), each.fallback)
            for name, each in getattr(found, _ALIASES).items()
        },
        {
            name: Said(value, f"[{_SERVE}] in {path}")
            for name, value in schema.given(getattr(found, _SERVE)).items()
        },
    )


def _layer(found: Any, origin: str) -> Layer:
    from octavo.cli import schema

    given = {**schema.given(found), **schema.given(getattr(found, _SAMPLING))}
    return {
        name: Said(v, origin)
        for name, v in given.items()
        if name not in (_SAMPLING, _SERVE, _ALIASES, _FALLBACK)
    }


def _explain(first: Any, path: Path, settings: list[str], of_tables: Mapping[str, list[str]]) -> UsageError:
    """`of_tables`: the keys of [sampling] and of [serve]."""
    from octavo.cli import schema

    *tables, key = (str(part) for part in first["loc"])
    in_sampling = tables == [_SAMPLING] or len(tables) == 3
    own = of_tables[_SAMPLING] if in_sampling else of_tables[_SERVE] if tables == [_SERVE] else None
    known = own or [*settings, _SAMPLING, *([_FALLBACK] if tables else [_SERVE, _ALIASES])]
    where = f"{path}: {key} in [{'.'.join(tables)}]" if tables else f"{path}: {key}"
    misplaced = [] if own else difflib.get_close_matches(key, of_tables[_SAMPLING], n=1)
    if not tables and isinstance(
        first["input"], dict
    ):  # a table: no setting is meant, however alike its name
        return UsageError(f"{path}: [{key}] is not a known table", remedy=_table_remedy(key))
    if misplaced and not difflib.get_close_matches(key, known, n=1):
        table = ".".join([*tables, _SAMPLING])
        return UsageError(f"{where} is not a known key", remedy=f"{misplaced[0]} belongs in [{table}].")
    return schema.explain(first, where, str(path), known)


def _table_remedy(key: str) -> str:
    close = difflib.get_close_matches(key, [_SAMPLING, _SERVE, _ALIASES], n=1)
    known = f"Tables are [{_SAMPLING}], [{_SERVE}] and [{_ALIASES}.NAME]."
    return f"Did you mean [{close[0]}]? {known}" if close else known
