"""JSON that comes with a checkpoint, read strictly: bounded, UTF-8, an object, no key twice.

RFC 8259 leaves duplicate keys, NaN and depth open; a file that uses them means different things to
different readers, so it is refused. What the keys mean is the callers' work.
"""

from __future__ import annotations

import json
from typing import Any

from octavo.errors import ModelFormatError
from octavo.sources.files import FETCH_AGAIN

MAX_DOCUMENT_BYTES = 32 << 20
_MAX_ITEMS = 2_000_000
"""Commas and brackets: bounds the memory a hostile file of few bytes an item would take (about 80 each)."""


def parse_object(data: bytes, name: str) -> dict[str, Any]:
    """The JSON object in `data`. Raises ModelFormatError naming `name` for anything else."""
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > _MAX_ITEMS:
        raise _malformed(name, f"it has more than {_MAX_ITEMS:,} items")
    try:
        text = data.decode("utf-8")
        parsed = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        if "\\ud" in text.lower():
            json.dumps(parsed, ensure_ascii=False).encode()  # an escaped half of a surrogate pair raises
    except RecursionError:
        raise _malformed(name, "it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise _malformed(name, f"byte {error.start} is not UTF-8") from error
    except UnicodeEncodeError as error:
        raise _malformed(name, "it holds half of a surrogate pair") from error
    except ValueError as error:  # JSONDecodeError, ours, and integers of thousands of digits
        raise _malformed(name, str(error)) from error
    if not isinstance(parsed, dict):
        raise _malformed(name, "it is not an object")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r:.100} stands in it twice")
    return result


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _malformed(name: str, why: str) -> ModelFormatError:
    return ModelFormatError(f"{name} is not usable JSON: {why}", remedy=FETCH_AGAIN)
