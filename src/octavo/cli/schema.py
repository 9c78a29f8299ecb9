"""pydantic models made from dataclass fields, and their complaints in our words.

Types are checked here, ranges by `octavo.validate`. pydantic takes a fifth of a second to import, so callers
import this module only where there is something to check.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import pydantic
import pydantic_settings

from octavo.cli.fields import bare_type, said_fields
from octavo.errors import InvalidParameterError, UsageError
from octavo.validate import BEAM_SEARCH_NAMES, BEAM_SEARCH_REMEDY

_SHOWN_CHARACTERS = 60
"""Of a wrong value in a message: it may be someone's whole text."""


class _Table(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", protected_namespaces=())


class _Variables(pydantic_settings.BaseSettings):
    model_config = pydantic_settings.SettingsConfigDict(
        env_ignore_empty=True, case_sensitive=True, validate_default=False, protected_namespaces=()
    )


def table(cls: type, **more: Any) -> Any:
    """A model with the fields of `cls`, all optional, and `more` of pydantic's (type, default) pairs."""
    hints = get_type_hints(cls)
    columns: dict[str, Any] = {name: (_lenient(hints[name]), None) for name in names(cls)}
    return pydantic.create_model(cls.__name__, __base__=_Table, **columns, **more)


def _lenient(hint: Any) -> Any:
    """A list of strings may be written as one string."""
    if hint != tuple[str, ...]:
        return hint

    def several(value: Any) -> Any:
        # A tuple, since what comes from a validator is no longer JSON, in which a list would do.
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    return Annotated[hint, pydantic.BeforeValidator(several)]


def variables(named: Mapping[str, Field[Any]], classes: Sequence[type]) -> Any:
    """A model that reads the environment: variable name -> the field it sets.

    A list is JSON (`["a", "b"]`), or one element as plain text; a mapping is JSON.
    """
    hints = {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}
    columns: dict[str, Any] = {}
    for variable, field in named.items():
        hint = hints[field.name]
        columns[field.name] = (
            Annotated[hint, pydantic_settings.NoDecode, pydantic.BeforeValidator(_decoder(hint))],
            pydantic.Field(default=None, validation_alias=variable),
        )
    return pydantic.create_model("Variables", __base__=_Variables, **columns)


def strict(model: Any, data: Mapping[str, Any]) -> Any:
    """Check data without converting types. Raises pydantic.ValidationError.

    JSON mode, because there a string may still be a path and an array a tuple.
    """
    return model.model_validate_json(json.dumps(data, default=str), strict=True)


def given(model: pydantic.BaseModel) -> dict[str, Any]:
    """What was said: the fields that were set, with `~` in paths expanded."""
    values = {name: getattr(model, name) for name in model.model_fields_set}
    return {name: v.expanduser() if isinstance(v, Path) else v for name, v in values.items()}


def explain(first: Any, where: str, place: str, known: Sequence[str]) -> UsageError:
    """An error from one entry of `ValidationError.errors()`.

    `where` names the key for the user, `place` what to correct; `known` are the keys that stand there.
    """
    key = str(first["loc"][-1]) if first["loc"] else where
    if first["type"] != "extra_forbidden":
        value = json.dumps(first["input"], default=str, ensure_ascii=False)
        value = value if len(value) <= _SHOWN_CHARACTERS else f"{value[:_SHOWN_CHARACTERS]}..."
        return InvalidParameterError(
            f"{where} is {value}: {_reason(first['msg'])}", remedy=f"Correct it in {place}.", parameter=key
        )
    if key in BEAM_SEARCH_NAMES:
        return UsageError(f"{where} is not supported", remedy=BEAM_SEARCH_REMEDY)
    close = difflib.get_close_matches(key, known, n=1)
    return UsageError(
        f"{where} is not a known key",
        remedy=f"Did you mean {close[0]}?" if close else f"Known keys: {', '.join(known)}.",
    )


def names(cls: type) -> list[str]:
    return [field.name for field in said_fields(cls)]


def _decoder(hint: Any) -> Callable[[str], Any]:
    kind = get_origin(bare_type(hint))
    if kind is tuple:
        return lambda text: _json(text) if text.lstrip().startswith("[") else (text,)
    return _json if kind is Mapping else lambda text: text


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error


def _reason(message: str) -> str:
    message = message.removeprefix("Value error, ").removeprefix("Input ")
    return message[0].lower() + message[1:]
