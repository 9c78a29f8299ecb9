"""`octavo plan`: what a load would do and need, from headers alone; a load that cannot fit is refused."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli.configuration import read_configuration
from octavo.cli.facts import storage_facts
from octavo.cli.loading import with_fallback
from octavo.cli.options import Given, accepts, with_model
from octavo.cli.output import note_all, write_json, write_table
from octavo.settings import Settings
from octavo.types import Progress

if TYPE_CHECKING:
    from rich.table import Table

    from octavo.load_plan import LoadPlan
    from octavo.loading import PlannedModel


_SETTINGS = tuple(field.name for field in dataclasses.fields(Settings) if field.name != "filter")


@accepts(Settings, only=_SETTINGS)
def plan(
    name: Annotated[str | None, typer.Argument(metavar="MODEL", help="The same as --model.")] = None,
    *,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    said: Given,
) -> None:
    """Show what a load would do and need.

    Runner, formats, memory by part and context, and why, from headers alone. A load that cannot fit is refused.
    """
    configuration = read_configuration(with_model(said, name))

    def make(settings: Settings, progress: Progress | None) -> PlannedModel:
        from octavo.loading import plan_model

        return plan_model(settings, progress=progress)

    planned, _ = with_fallback(configuration, make)
    note_all(planned.source.notices)
    named = {"model": planned.source.location, "revision": planned.source.revision}
    if json:
        write_json({**named, **planned.plan.to_json()})
        return
    from rich.text import Text

    said_of = [*planned.plan.reasons, *storage_facts(planned.source)]
    reasons = Text("\n".join(f"- {reason}" for reason in said_of))
    title = Text(" at ".join(name for name in named.values() if name is not None))
    write_table(title, _weights(planned.plan), _memory(planned.plan), reasons)


def _weights(made: LoadPlan) -> Table:
    from rich.table import Table

    from octavo.units import readable_bytes

    table = Table(title="Weights", title_justify="left", box=None, pad_edge=False)
    table.add_column("format")
    for column in ("tensors", "in the file", "packed"):
        table.add_column(column, justify="right")
    for part in made.weights:
        sizes = (readable_bytes(part.file_bytes), readable_bytes(part.packed_bytes))
        table.add_row(part.format, str(part.tensors), *sizes)
    table.add_row("all", "", readable_bytes(made.file_bytes), readable_bytes(made.packed_bytes))
    return table


def _memory(made: LoadPlan) -> Table:
    from rich.table import Table

    from octavo.units import readable_bytes

    table = Table(title="Memory", title_justify="left", box=None, pad_edge=False)
    table.add_column("where")
    table.add_column("part")
    table.add_column("size", justify="right")
    for pool in made.pools:
        for name, count in pool.parts.items():
            table.add_row(pool.name, name, readable_bytes(count))
        table.add_row(pool.name, "running, all", readable_bytes(pool.running_bytes))
        table.add_row(pool.name, "peak, loading or running", readable_bytes(pool.needed_bytes))
        table.add_row(pool.name, "usable", readable_bytes(pool.usable_bytes))
    return table
