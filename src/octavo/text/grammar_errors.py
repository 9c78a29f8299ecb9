"""What is wrong with a grammar, in words that name the place: refusals of ours, and llguidance's errors as ours.

Knows the texts of grammars and of errors; compiling is `octavo.text.grammar`'s work.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from octavo.errors import InvalidGrammarError
from octavo.types import Grammar

_NAMES = {
    "regex": "the regular expression",
    "lark": "the Lark grammar",
    "json_schema": "the JSON schema",
    "tool_calls": "the schemas of the tools",
}

_SHOWN_CHARACTERS = 200

_PLACES_TRIED = 500
"""Parts of a schema that are compiled to find the one at fault: half a second at most."""

_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose keys are names and whose values are schemas."""
_DATA = ("enum", "const", "default", "examples")
"""Keywords whose values are data: what looks like a keyword inside them is none."""

_LARK_TEXT = re.compile(r'"(?:\\.|[^"\\\n])*"|(?://|#)[^\n]*|/(?:\\.|[^/\\])+/')
"""Strings, comments and regular expressions, cut as llguidance cuts them (a regular expression may span lines): what
is left are rules and directives. A cut of ours that differed would let a special token through."""
_LARK_UNKEPT = (
    (re.compile(r"<"), "a special token: text alone can be asked for"),
    (re.compile(r"%llguidance\b"), "%llguidance, which Octavo does not pass on"),
    (re.compile(r"(?<=[\[,\s])temperature\s*="), "temperature of a rule: it holds for the whole request"),
    (re.compile(r"(?<=[\[,\s])stop\s*="), "stop of a rule, which would take back tokens that were generated"),
    (re.compile(r"(?<=[\[,\s])(?:stop_)?capture\b\s*(?=[=,\]])"), "capture of a rule, which nobody reads"),
)


def refuse_unkept(lark: str) -> None:
    """Raises InvalidGrammarError for what llguidance would take and we could not keep."""
    rules = _LARK_TEXT.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), lark)
    for pattern, what in _LARK_UNKEPT:
        if (found := pattern.search(rules)) is not None:
            raise InvalidGrammarError(
                f"the Lark grammar has, in line {rules.count(chr(10), 0, found.start()) + 1}, {what}",
                remedy="Leave it out of the grammar.",
            )


def explain(grammar: Grammar, said: str) -> InvalidGrammarError:
    """An error that llguidance gave for a regular expression, Lark rules or tools, as ours."""
    what, said = _NAMES[grammar.kind], said.removeprefix("panic: ")
    if grammar.kind in ("tool_calls", "json_schema"):
        place, (_, reason) = "", _place_in_lark(said)
        remedy = "Take simpler schemas" + (
            ', or tool_choice "auto" without strict.' if grammar.kind == "tool_calls" else "."
        )
    elif grammar.kind == "regex":
        place, reason = _place_in_regex(grammar.text, said)
        remedy = "Correct it; it is anchored at both ends, and has no look-around or back references."
    else:
        place, reason = _place_in_lark(said)
        remedy = "Correct it: rules are lower case, terminals upper case, and the first rule is start."
    return InvalidGrammarError(f"{what} cannot be used{place}: {_short(reason)}", remedy=remedy)


def explain_schema(text: str, said: str, error_of: Callable[[str], str]) -> InvalidGrammarError:
    """An error that llguidance gave for a JSON schema, as ours. `error_of`: the error of a schema, "" for none."""
    where = _place_in_schema(json.loads(text), said, error_of)
    listed = re.search(r"Unimplemented keys: (\[.*?\])", said)
    if listed is not None:
        return InvalidGrammarError(
            f"the JSON schema says {' and '.join(json.loads(listed[1]))} at {where}, which cannot be enforced",
            remedy="Leave it out of the schema, and check the answer for it.",
        )
    reason = said.replace(". Enable 'coerce_one_of' option to approximate oneOf with anyOf", "")
    reasons = [line.removeprefix("error: ") for line in reason.splitlines() if line.startswith("error: ")]
    return InvalidGrammarError(
        f"the JSON schema cannot be used at {where}: {_short(reasons[0] if reasons else reason)}",
        remedy="Correct the schema, or take a simpler one: alternatives of oneOf must exclude each other, and "
        "references stay inside the schema.",
    )


def _place_in_regex(text: str, said: str) -> tuple[str, str]:
    """The parser draws a caret under the place, and names the reason last."""
    lines = said.splitlines()
    carets = [line for line in lines if line.strip() and not line.strip(" ^")]
    reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if carets and reasons and len(text.splitlines()) == 1:
        return f" at character {len(carets[0]) - len(carets[0].lstrip()) - 4}", reasons[0]
    reason = reasons[0] if reasons else re.sub(r'^at [\d()]+: (invalid regex ".*" \(in regex\): )?', "", said)
    return "", reason


def _place_in_lark(said: str) -> tuple[str, str]:
    found = re.match(r"at (\d+)\((\d+)\): ", said)
    if found is None:
        return "", said
    reasons = [line.removeprefix("error: ") for line in said.splitlines() if line.startswith("error: ")]
    return f" at line {found[1]}, column {found[2]}", reasons[0] if reasons else said[found.end() :]


def _place_in_schema(schema: Any, said: str, error_of: Callable[[str], str]) -> str:
    """JSON pointer of the smallest part that alone gives the same error, as "#/properties/a"."""
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    smallest, place = len(json.dumps(schema)), "#"
    for where, each in itertools.islice(_schemas(schema, "#"), _PLACES_TRIED):
        text = json.dumps(each)
        if len(text) < smallest and error_of(json.dumps({**shared, **each})) == said:
            smallest, place = len(text), where
    return place


def _schemas(value: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(value, list):
        for place, each in enumerate(value):
            yield from _schemas(each, f"{where}/{place}")
    if not isinstance(value, Mapping):
        return
    yield where, value
    for key, below in value.items():
        if key in _NAMED_SCHEMAS and isinstance(below, Mapping):
            for name, schema in below.items():
                yield from _schemas(schema, f"{where}/{key}/{name}")
        elif key not in _DATA:
            yield from _schemas(below, f"{where}/{key}")


def _short(reason: str) -> str:
    reason = reason.partition("\n")[0].strip()
    return reason if len(reason) <= _SHOWN_CHARACTERS else f"{reason[:_SHOWN_CHARACTERS]}..."
