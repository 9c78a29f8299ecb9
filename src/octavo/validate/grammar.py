"""What a generated text has to match: one of `json_object`, `json_schema`, `regex` and `lark`, checked for size.

Whether it compiles is `octavo.text.grammar`'s question.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from octavo.errors import InvalidGrammarError, InvalidParameterError
from octavo.settings import SamplingParams
from octavo.types import Grammar
from octavo.validate.limits import DEFAULT_LIMITS, Limits
from octavo.validate.values import flag, not_unicode, wrong

_ANY_OBJECT = '{"type": "object"}'


def resolve_grammar(params: SamplingParams, *, limits: Limits = DEFAULT_LIMITS) -> Grammar | None:
    """The grammar that `params` ask for; None: none.

    Raises InvalidParameterError for a wrong type or two that contradict each other, and InvalidGrammarError for
    a schema that is not JSON, or one that is too large or too deep.
    """
    asked = {
        name: value
        for name, value in (
            ("json_object", flag("json_object", params.json_object) or None),
            ("json_schema", params.json_schema),
            ("regex", params.regex),
            ("lark", params.lark),
            ("ignore_eos", flag("ignore_eos", params.ignore_eos) or None),
        )
        if value is not None
    }
    if len(asked) > 1:
        first, second = list(asked)[:2]
        why = "" if second != "ignore_eos" else ": a text that matches ends with a stop token"
        raise InvalidParameterError(
            f"{first} and {second} contradict each other{why}",
            remedy="Leave one of them out.",
            parameter=second,
        )
    match asked:
        case {"json_object": _}:
            return Grammar("json_schema", _ANY_OBJECT)
        case {"json_schema": schema}:
            return Grammar("json_schema", _schema_text(schema, limits))
        case {"regex": text}:
            return Grammar("regex", _text("regex", text, limits))
        case {"lark": text}:
            return Grammar("lark", _text("lark", text, limits))
    return None


def _schema_text(schema: object, limits: Limits) -> str:
    if isinstance(schema, str):
        text = _text("json_schema", schema, limits)
        try:
            value = json.loads(text, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            why = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
            raise InvalidGrammarError(
                f"json_schema is not JSON: {why}",
                remedy='Give a schema such as {"type": "object"}; on the command line also a file.',
            ) from error
    else:
        value = schema
    if not isinstance(value, Mapping):
        raise wrong("json_schema", schema, "a JSON schema: a mapping, or the text of a JSON object")
    if _depth(value, limits.schema_depth) > limits.schema_depth:
        raise InvalidGrammarError(
            f"json_schema is nested more than {limits.schema_depth} deep",
            remedy="Name its inner parts in $defs, and refer to them.",
        )
    if isinstance(schema, str):
        return text
    try:
        return _text("json_schema", json.dumps(value, ensure_ascii=False, allow_nan=False), limits)
    except (TypeError, ValueError) as error:
        raise InvalidGrammarError(
            f"json_schema is not JSON: {error}",
            remedy="Use dicts with string keys, lists, strings, numbers, true, false and None only.",
        ) from error


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _depth(value: object, most: int) -> int:
    """How deep objects and arrays lie inside each other; more than `most` is not looked into."""
    layer, depth = [value], 0
    while layer and depth <= most:
        inside: list[object] = []
        for each in layer:
            if isinstance(each, Mapping):
                inside += each.values()
            elif isinstance(each, list | tuple):
                inside += each
        containers = any(isinstance(each, Mapping | list | tuple) for each in layer)
        layer, depth = inside, depth + containers
    return depth


def _text(parameter: str, text: object, limits: Limits) -> str:
    if not isinstance(text, str):
        raise wrong(parameter, text, "a string")
    if (offset := not_unicode(text)) is not None:
        raise wrong(parameter, text, f"Unicode text (character {offset} is half a surrogate pair)")
    if not text.strip():
        raise wrong(parameter, text, "a text that is not empty")
    if (size := len(text.encode())) > limits.grammar_bytes:
        raise InvalidGrammarError(
            f"{parameter} has {size} bytes; at most {limits.grammar_bytes} are taken", remedy="Simplify it."
        )
    return text
