"""Flags from dataclass fields: the one place where `Settings` and `SamplingParams` become command line options.

A field is a flag (`max_new_tokens` is --max-new-tokens) unless its metadata says `cli=False`.
A flag that was not given is left out of `said`, so that the other layers of `octavo.cli.configuration` can
speak. Environment variables and octavo.toml are read there, not here.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from octavo.cli.fields import bare_type, flag_name, said_fields
from octavo.cli.prompt import read_file
from octavo.errors import UsageError

Given = Mapping[str, Any]
"""Field name -> value, for the flags that were given."""

_SHORT = {"model": "-m"}
_METAVARS = {"file": "FILE", "file or text": "FILE|JSON"}


@dataclasses.dataclass(slots=True)
class Invocation:
    """What the error boundary needs to know of the command it ran; typer carries it as `ctx.obj`."""

    debug: bool = False


def accepts(
    *classes: type, only: Sequence[str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command --debug, and a flag for each field of the dataclasses (or `only` those named).

    The command takes what was given as its keyword `said`, if it has `classes`.
    """
    fields = [field for cls in classes for field in _flag_parameters(cls) if not only or field.name in only]
    names = [parameter.name for parameter in fields]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "said"]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            del values["debug"]
            given = {name: values.pop(name) for name in names}
            if classes:
                said = {name: _frozen(value) for name, value in given.items() if value is not None}
                values["said"] = said | _read(said, classes)
            command(**values)

        parameters = [*own, *fields, _DEBUG]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def with_model(said: Given, model: str | None) -> Given:
    """`said` with the model given as an argument. Raises UsageError where --model says another."""
    if model is None:
        return said
    if said.get("model", model) != model:
        raise UsageError(
            f"the model is given twice, as {model} and --model {said['model']}", remedy="Give one."
        )
    return {**said, "model": model}


def _flag_parameters(cls: type) -> list[inspect.Parameter]:
    hints = get_type_hints(cls)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=_annotation(field, bare_type(hints[field.name])),
        )
        for field in said_fields(cls)
        if field.metadata.get("cli", True)
    ]


def _annotation(field: dataclasses.Field[Any], hint: Any) -> Any:
    flag = flag_name(field)
    names = [f"{flag}/--no-{flag[2:]}" if hint is bool else flag]
    if field.name in _SHORT:
        names.append(_SHORT[field.name])
    repeated = get_origin(hint) is tuple
    item = get_args(hint)[0] if repeated else hint
    option = typer.Option(
        *names,
        help=_help(field),
        show_default=False,
        metavar=f"<{item.__name__}>" if repeated else _METAVARS.get(field.metadata.get("reads", "")),
    )
    return Annotated[(list[item] if repeated else hint) | None, option]  # type: ignore[valid-type]


def _help(field: dataclasses.Field[Any]) -> str:
    text: str = field.metadata["help"]
    default: Any = field.default
    if "[default" in text or default in (None, (), False):
        return text
    return f"{text} [default: {'on' if default is True else default}]"


def _read(said: Given, classes: Sequence[type]) -> dict[str, str]:
    """The texts of flags that name a file, or may. Raises UsageError where one cannot be read."""
    texts = {}
    for field in (field for cls in classes for field in said_fields(cls)):
        reads, value = field.metadata.get("reads"), said.get(field.name)
        if value is None or reads is None or (reads == "file or text" and value.lstrip().startswith("{")):
            continue
        try:
            texts[field.name] = read_file(Path(value)).decode()
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{value}, which {flag_name(field)} names, is not UTF-8 text", remedy="Convert it to UTF-8."
            ) from error
    return texts


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _note_debug(context: typer.Context, value: bool) -> bool:
    if value:
        context.ensure_object(Invocation).debug = True
    return value


_DEBUG = inspect.Parameter(
    "debug",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_note_debug)
    ],
)
