"""The last evaluation of each format of a model, kept in the cache for `models show` to quote.

One JSON file a model, named by its fingerprint. It can be made again, so one that cannot be read counts as none.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path

from octavo.evaluate.results import Evaluation
from octavo.paths import private_folder

_FOLDER = "cards"
_MOST_BYTES = 1 << 20


def keep(root: Path, evaluation: Evaluation, today: date) -> None:
    """`root` is `octavo.paths.cache_root`'s. Formats that were measured before and not now stay.

    A format compared with itself says nothing and is left out, and fewer tokens never replace more.
    """
    where = f"{evaluation.scored_tokens:,} tokens of {evaluation.text}, {today.isoformat()}"
    if evaluation.reference is not None:
        where += f", reference {evaluation.reference}"
    lines = {**kept(root, evaluation.fingerprint)}
    for each in evaluation.formats:
        itself = each.format == evaluation.reference
        if not itself and _tokens(lines.get(each.format)) <= evaluation.scored_tokens:
            lines[each.format] = f"{each.in_words()} ({where})"
    path = _path(private_folder(root / _FOLDER), evaluation.fingerprint)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(lines), encoding="utf-8")
    unfinished.replace(path)


def kept(root: Path, fingerprint: str) -> Mapping[str, str]:
    """Format -> a line for a person; empty where nothing is kept."""
    try:
        with _path(root / _FOLDER, fingerprint).open("rb") as file:
            found = json.loads(file.read(_MOST_BYTES))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {str(name): str(line) for name, line in found.items()}


def _tokens(line: str | None) -> int:
    """How many tokens a kept line is of; 0 where it does not say."""
    found = re.search(r"\(([0-9,]+) tokens of ", line or "")
    return int(found[1].replace(",", "")) if found and found[1].strip(",") else 0


def _path(folder: Path, fingerprint: str) -> Path:
    return folder / f"{fingerprint[:32]}.json"
