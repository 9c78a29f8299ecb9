"""Grammars as a user gives them: types, sizes, depth and contradictions, before anything is compiled."""

from __future__ import annotations

import json
from typing import Any

import pytest

from octavo.errors import InvalidGrammarError, InvalidParameterError
from octavo.settings import SamplingParams
from octavo.types import Grammar
from octavo.validate import Limits, resolve_grammar, validate_sampling_params


def resolved(**said: Any) -> Grammar | None:
    clean = validate_sampling_params(SamplingParams(**said), vocab_size=10)
    assert resolve_grammar(clean) == resolve_grammar(SamplingParams(**said))
    return resolve_grammar(clean)


def test_nothing_said_is_no_grammar() -> None:
    assert resolved() is None
    assert resolved(json_object=False) is None


def test_each_way_to_say_one() -> None:
    assert resolved(json_object=True) == Grammar("json_schema", '{"type": "object"}')
    assert resolved(regex="a|b") == Grammar("regex", "a|b")
    assert resolved(lark='start: "a"') == Grammar("lark", 'start: "a"')
    text = '{"type":   "integer"}'
    assert resolved(json_schema=text) == Grammar("json_schema", text)
    assert resolved(json_schema={"type": "integer"}) == Grammar("json_schema", '{"type": "integer"}')


def test_properties_keep_their_order_and_their_letters() -> None:
    schema = {"properties": {"zoë": {}, "a": {}}}
    grammar = resolved(json_schema=schema)
    assert grammar is not None
    assert "zoë" in grammar.text
    assert list(json.loads(grammar.text)["properties"]) == ["zoë", "a"]


@pytest.mark.parametrize(
    ("said", "parameter"),
    [
        ({"json_schema": 5}, "json_schema"),
        ({"json_schema": "5"}, "json_schema"),
        ({"json_schema": "true"}, "json_schema"),
        ({"json_schema": [1]}, "json_schema"),
        ({"json_schema": ""}, "json_schema"),
        ({"json_object": "yes"}, "json_object"),
        ({"json_object": 1}, "json_object"),
        ({"regex": 5}, "regex"),
        ({"regex": " "}, "regex"),
        ({"regex": "\ud800"}, "regex"),
        ({"lark": b"start"}, "lark"),
        ({"lark": ""}, "lark"),
    ],
)
def test_wrong_types_name_their_field(said: dict[str, Any], parameter: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        resolved(**said)
    assert caught.value.parameter == parameter


@pytest.mark.parametrize(
    "said",
    [
        {"json_object": True, "json_schema": {}},
        {"json_object": True, "regex": "a"},
        {"json_schema": {}, "lark": "a"},
        {"regex": "a", "lark": "a"},
        {"json_object": True, "ignore_eos": True},
        {"json_schema": {}, "ignore_eos": True},
        {"regex": "a", "ignore_eos": True},
        {"lark": "a", "ignore_eos": True},
    ],
)
def test_contradictions_name_both(said: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        resolved(**said)
    assert all(name in caught.value.message for name in said)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


def test_depth_has_a_limit_on_both_sides_of_which_it_is_tested() -> None:
    assert resolved(json_schema=nested(32)) is not None
    assert resolved(json_schema=json.dumps(nested(32))) is not None
    for schema in (nested(33), json.dumps(nested(33)), "[" * 100_000, '{"a":' * 500 + "1" + "}" * 500):
        with pytest.raises(InvalidGrammarError):
            resolved(json_schema=schema)


def test_size_has_a_limit_on_both_sides_of_which_it_is_tested() -> None:
    least = {"enum": ["é" * ((64 << 9) - 7)]}
    assert len(json.dumps(least, ensure_ascii=False).encode()) == 64 << 10
    assert resolved(json_schema=least) is not None
    for said in (
        {"json_schema": {"enum": [*least["enum"], ""]}},
        {"regex": "a" * ((64 << 10) + 1)},
        {"lark": "é" * (32 << 10) + "a"},
    ):
        with pytest.raises(InvalidGrammarError, match="65536"):
            resolved(**said)
    with pytest.raises(InvalidGrammarError):
        resolve_grammar(SamplingParams(regex="abc"), limits=Limits(grammar_bytes=2))


@pytest.mark.parametrize(
    "schema", ["{", '{"a": NaN}', '{"a": Infinity}', {"a": float("nan")}, {"a": {1, 2}}, {"a": object()}]
)
def test_what_is_not_json_is_said_to_be(schema: Any) -> None:
    with pytest.raises(InvalidGrammarError, match="json_schema is not JSON"):
        resolved(json_schema=schema)
