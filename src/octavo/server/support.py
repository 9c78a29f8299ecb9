"""The tables of docs/server.md: what becomes of each field, and every flag, from where they are defined.

`python -m octavo.server.support docs/server.md` writes them into the page, between its comments.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from pydantic import BaseModel

from octavo.server.schema import ChatRequest, CompletionRequest, ResponsesRequest, support_of
from octavo.server.settings import ServerSettings

_ROUTES: tuple[tuple[str, type[BaseModel]], ...] = (
    ("/v1/chat/completions", ChatRequest),
    ("/v1/completions", CompletionRequest),
    ("/v1/responses", ResponsesRequest),
)
_ORDER = ("honoured", "ignored", "refused")


def matrix() -> str:
    """Markdown: for each route its fields, what becomes of them, and the note their model has."""
    parts = []
    for path, model in _ROUTES:
        rows = [
            f"| `{name}` | {support_of(field)} | {field.description} |"
            for name, field in sorted(
                model.model_fields.items(), key=lambda each: _ORDER.index(support_of(each[1]))
            )
        ]
        parts.append("\n".join((f"### {path}", "", "| Field | | |", "|---|---|---|", *rows)))
    return "\n\n".join(parts) + "\n"


def flags() -> str:
    """Markdown: the flags of serving. Those of loading are `octavo generate --help`'s too."""
    rows = []
    for field in dataclasses.fields(ServerSettings):
        name, default = field.name.replace("_", "-"), field.default
        shown = "" if default in (None, (), 0) or "[default" in field.metadata["help"] else f"`{default}`"
        if default is True:
            name, shown = f"{name}`, `--no-{name}", "on"
        rows.append(f"| `--{name}` | {shown} | {field.metadata['help']} |")
    return "\n".join(("| Flag | Default | |", "|---|---|---|", *rows)) + "\n"


def page_with_tables(page: str) -> str:
    for name, end, table in (
        ("support matrix", "end", matrix()),
        ("flags", "end flags", flags()),
    ):
        begin, after = f"<!-- {name} -->\n", f"<!-- {end} -->"
        head, _, rest = page.partition(begin)
        page = head + begin + table + after + rest.partition(after)[2]
    return page


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(page_with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
