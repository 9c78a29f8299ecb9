"""`octavo config`: the value of every setting, and which layer said it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from octavo.cli.configuration import FLAG, Configuration, Resolved, check, read_configuration
from octavo.cli.fields import flag_name, said_fields, variable_name
from octavo.cli.options import Given, accepts
from octavo.cli.output import note_all, write_json, write_table
from octavo.errors import OctavoError
from octavo.server.settings import ServerSettings
from octavo.settings import SamplingParams, Settings


@accepts(Settings, SamplingParams)
def config(
    *,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    said: Given,
) -> None:
    """Show each setting's value and where it came from.

    A flag beats an OCTAVO_* variable, which beats [models.NAME], which beats octavo.toml in the working folder
    and then in the user's config folder, which beats what the model's own files say.
    """
    configuration = read_configuration(said)
    note_all(configuration.notices)
    resolved = configuration.resolve()
    check(resolved)
    rows = [*_rows(resolved, _model_says(resolved.settings)), *_rows_of_serving(configuration)]
    if json:
        write_json({name: {"value": value, "origin": origin} for name, value, origin, _ in rows})
        return
    from rich.table import Table
    from rich.text import Text

    table = Table("setting", "value", "from", "variable", box=None, pad_edge=False)
    for name, value, origin, variable in rows:
        table.add_row(name, Text(_in_words(value)), Text(origin), variable)
    write_table(table)


def _rows(resolved: Resolved, model: Mapping[str, Any]) -> list[tuple[str, Any, str, str]]:
    """(name, value, origin, variable) of every field."""
    rows = []
    for values in (resolved.settings, resolved.sampling):
        for field in said_fields(type(values)):
            value, origin = getattr(values, field.name), resolved.origins.get(field.name, "default")
            if origin == "default" and field.name in model:
                value, origin = model[field.name], "model"
            if origin == FLAG:
                origin = flag_name(field)
            rows.append((field.name, value, origin, variable_name(field)))
    return rows


def _rows_of_serving(configuration: Configuration) -> list[tuple[str, Any, str, str]]:
    settings, origins = configuration.serving()
    return [
        (each.name, getattr(settings, each.name), origins.get(each.name, "default"), variable_name(each))
        for each in said_fields(ServerSettings)
    ]


def _in_words(value: Any) -> str:
    """As octavo.toml has it."""
    if value is None or value == ():
        return "-"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _model_says(settings: Settings) -> Mapping[str, Any]:
    """The model's own sampling values, where the model is on this machine."""
    from octavo.sources.resolve import resolve
    from octavo.validate import SamplingDefaults, read_sampling_defaults

    try:
        source = resolve(
            settings.model, revision=settings.revision, offline=True, cache_dir=settings.cache_dir
        )
    except OctavoError:
        return {}
    said, neutral = read_sampling_defaults(source.generation_config), SamplingDefaults()
    return {
        field.name: getattr(said, field.name)
        for field in dataclasses.fields(SamplingDefaults)
        if getattr(said, field.name) != getattr(neutral, field.name) and field.name != "notices"
    }
