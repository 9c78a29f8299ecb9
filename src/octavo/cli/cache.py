"""`octavo cache`: what the packed weights on disk take, and making room."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli.configuration import read_configuration
from octavo.cli.options import Given, accepts
from octavo.cli.output import note, write_json, write_table
from octavo.errors import UsageError
from octavo.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

app = typer.Typer(help="Size and prune the packed weights on disk.", rich_markup_mode=None)

_DAY_SECONDS = 24 * 3600.0


@app.command()
@accepts(Settings, only=("cache_dir",))
def size(
    *,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    said: Given,
) -> None:
    """Show every packed model, what it takes, and when it was last used."""
    from octavo.packed_cache import cache_entries

    root = _root(said)
    entries = cache_entries(root)
    total_bytes = sum(entry.nbytes for entry in entries)
    if json:
        listed = [dataclasses.asdict(entry) | {"path": str(entry.path)} for entry in entries]
        write_json({"folder": str(root), "total_bytes": total_bytes, "entries": listed})
        return
    from rich.table import Table

    from octavo.units import readable_bytes

    table = Table("model", "format", "layout", box=None, pad_edge=False)
    table.add_column("size", justify="right")
    table.add_column("last used")
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used))
        table.add_row(entry.model, entry.format, entry.layout, readable_bytes(entry.nbytes), used)
    table.add_row(f"all in {root}", "", "", readable_bytes(total_bytes), "")
    write_table(table)


@app.command()
@accepts(Settings, only=("cache_dir",))
def prune(
    *,
    older_than: Annotated[
        float | None,
        typer.Option("--older-than", metavar="DAYS", min=0, help="Remove what was not used for this long."),
    ] = None,
    max_size: Annotated[
        float | None,
        typer.Option("--max-size", metavar="GIB", min=0, help="Keep this much, the last used first."),
    ] = None,
    all: Annotated[bool, typer.Option("--all", help="Remove everything.")] = False,
    said: Given,
) -> None:
    """Remove packed models. They are packed again when they are next used."""
    if older_than is None and max_size is None and not all:
        raise UsageError(
            "nothing was said about what to remove", remedy="Give --older-than DAYS, --max-size GIB or --all."
        )
    from octavo.packed_cache import prune as prune_packed
    from octavo.units import readable_bytes

    freed_bytes = prune_packed(
        _root(said),
        older_than_seconds=None if older_than is None else older_than * _DAY_SECONDS,
        max_bytes=None if max_size is None else int(max_size * (1 << 30)),
        everything=all,
    )
    note(f"freed {readable_bytes(freed_bytes)}")


def _root(said: Given) -> Path:
    from octavo.paths import cache_root

    return cache_root(read_configuration(said).resolve().settings.cache_dir)
