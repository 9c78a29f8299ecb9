"""The support matrix of docs/server.md, made from the fields that requests are read by.

`python -m octavo.server.support docs/server.md` writes it into the page, between its two comments.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from pydantic import BaseModel

from octavo.server.schema import ChatRequest, CompletionRequest, ResponsesRequest, support_of

_ROUTES: tuple[tuple[str, type[BaseModel]], ...] = (
    ("/v1/chat/completions", ChatRequest),
    ("/v1/completions", CompletionRequest),
    ("/v1/responses", ResponsesRequest),
)
_BEGIN, _END = "<!-- support matrix -->\n", "<!-- end -->"
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


def main(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END), re.DOTALL)
    page.write_text(pattern.sub(lambda _: _BEGIN + matrix() + _END, text), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
