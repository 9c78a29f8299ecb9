"""Grammars on the default model at temperature 1: whatever ends by itself is valid, without an exception."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest

from octavo import SamplingParams, errors
from octavo.types import FinishReason

pytestmark = pytest.mark.model

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS = [
    PERSON,
    {"type": "array", "items": PERSON, "maxItems": 2},
    {"enum": ["red", "green", "blue"]},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 3},
    {"anyOf": [{"type": "integer"}, {"type": "null"}, {"type": "string", "maxLength": 10}]},
    {"type": "string", "pattern": "^[A-Z][a-z]{1,8}( [A-Z][a-z]{1,8}){0,2}$"},
    {"type": "string", "format": "date"},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": 7}], "items": False, "minItems": 2},
]


def stopped(llm, said, *, n=4, max_new_tokens=64):
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=1.0, top_p=1.0, seed=11, n=n, **said)
    choices = llm.chat([{"role": "user", "content": "Describe someone you know."}], params).choices
    return [each.text for each in choices if each.finish_reason is FinishReason.STOP]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_what_ends_is_valid(default_llm, schema):
    texts = stopped(default_llm, {"json_schema": schema})
    for text in texts:
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    assert texts, "nothing ended, so nothing was tested"


def test_a_json_object_is_one(default_llm):
    texts = stopped(default_llm, {"json_object": True}, max_new_tokens=100)
    assert all(isinstance(json.loads(text), dict) for text in texts)
    assert texts


@pytest.mark.parametrize("pattern", [r"(yes|no), because [a-z ]{5,20}\.", r"\d{3}-\d{4}", r" ?x{2,5} ?"])
def test_expressions_match_whole_texts(default_llm, pattern):
    texts = stopped(default_llm, {"regex": pattern})
    assert all(re.fullmatch(pattern, text) for text in texts), texts
    assert texts


def test_rules(default_llm):
    lark = 'start: greeting " " NAME "!"\ngreeting: "Hello" | "Good day"\nNAME: /[A-Z][a-z]{1,9}/'
    texts = stopped(default_llm, {"lark": lark})
    assert all(re.fullmatch(r"(Hello|Good day) [A-Z][a-z]{1,9}!", text) for text in texts), texts
    assert len(texts) == 4


def test_a_stream_is_the_same_text(default_llm):
    params = SamplingParams(max_new_tokens=64, temperature=1.0, seed=3, json_schema=json.dumps(PERSON))
    turns = [{"role": "user", "content": "Who are you?"}]
    text = "".join(event.text for event in default_llm.stream_chat(turns, params))
    assert text == default_llm.chat(turns, params).text


def test_neighbors_without_a_grammar_are_what_they_are_alone(default_llm):
    free = SamplingParams(max_new_tokens=24, seed=4)
    alone = default_llm.generate("The sea", free)
    stream = default_llm.stream("The sea", free)
    default_llm.generate("A date:", SamplingParams(max_new_tokens=16, regex=r" \d{4}-\d\d-\d\d"))
    assert list(stream)[-1].completion.token_ids == alone.token_ids


def test_a_grammar_that_does_not_compile_is_refused_before_anything_runs(default_llm):
    before = default_llm.info()["engine"]["steps"]
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(errors.InvalidGrammarError, match="uniqueItems at #/properties/a"):
        default_llm.generate("x", SamplingParams(json_schema=schema))
    assert default_llm.info()["engine"]["steps"] == before
