"""The last evaluation of each format of a model, kept in the cache for `models show` to quote.

One JSON file a model, named by its fingerprint. It can be made again, so one that cannot be read counts as none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import date
from pathlib import Path

from octavo.evaluate.results import Evaluation
from octavo.paths import private_folder

_FOLDER = "cards"
_MOST_BYTES = 1 << 20


def keep(root: Path, evaluation: Evaluation, today: date) -> None:
    """`root` is `octavo.paths.cache_root`'s. Formats that were measured before and not now stay."""
    where = f"{evaluation.scored_tokens:,} tokens of {evaluation.text}, {today.isoformat()}"
    if evaluation.reference is not None:
        where += f", reference {evaluation.reference}"
    lines = {**kept(root, evaluation.fingerprint)}
    lines |= {each.format: f"{each.in_words()} ({where})" for each in evaluation.formats}
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


def _path(folder: Path, fingerprint: str) -> Path:
    return folder / f"{fingerprint[:32]}.json"
