"""A request's body -> plain values, or a refusal that says where: JSON as RFC 8259 has it, and no more.

Python's own parser takes NaN, 1e999 and duplicate keys, and fails in its own ways on depth and long numbers.
What no client means is refused here, before anything else sees it. Linear in the body's bytes.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from octavo.server.faults import HttpFault, bad_request

MAX_DEPTH = 64
"""Nested arrays and objects; tool schemas are the deepest thing a request carries."""
MAX_NUMBER_CHARACTERS = 64


def parse(body: bytes) -> dict[str, Any]:
    """The object in `body`. Raises bad_request with code invalid_json."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _wrong(f"byte {error.start} is not UTF-8") from None
    _check_depth(body)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _wrong(f"{error.msg} at character {error.pos}") from None
    except RecursionError:
        raise _wrong("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise _wrong(f"it is {_NAMES.get(type(value), 'no object')}, not an object")
    if b"\\u" in body:
        _check_text(value)
    return value


def _check_depth(body: bytes) -> None:
    """Depth without recursion; brackets inside strings do not count."""
    depth = 0
    for bracket in _BRACKETS.finditer(_STRINGS.sub(b"", body)):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > MAX_DEPTH:
            raise _wrong(f"it is nested more than {MAX_DEPTH} deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _wrong(f"the key {name[:40]!a} stands in one object twice")
            seen.add(name)
    return found


def _check_text(value: Any) -> None:
    """Escapes are the only way to half a surrogate pair: UTF-8 has none."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _wrong("a string holds half a surrogate pair") from None
    elif isinstance(value, dict):
        for key, each in value.items():
            _check_text(key)
            _check_text(each)
    elif isinstance(value, list):
        for each in value:
            _check_text(each)


def _integer(text: str) -> int:
    if len(text) > MAX_NUMBER_CHARACTERS:
        raise _wrong(f"a number has {len(text)} digits; at most {MAX_NUMBER_CHARACTERS} are taken")
    return int(text)


def _real(text: str) -> float:
    number = float(text) if len(text) <= MAX_NUMBER_CHARACTERS else math.inf
    if not math.isfinite(number):
        raise _wrong("a number is too long or too large")
    return number


def _constant(name: str) -> Any:
    raise _wrong(f"{name} is no JSON value")


def _wrong(what: str) -> HttpFault:
    return bad_request(f"the body is not the JSON object it must be: {what}", code="invalid_json")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_real, parse_constant=_constant
)
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
"""Also one that never ends, up to the end: so that no quote is looked at twice."""
_BRACKETS = re.compile(rb"[\[\]{}]")
_NAMES = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
