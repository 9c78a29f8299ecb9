"""Grammars on small real tokenizers: random walks through the allowed tokens, judged by jsonschema, re and others."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator

import jsonschema
import numpy as np
import pytest

from octavo.errors import InvalidGrammarError
from octavo.text.grammar import GrammarConstraint, Grammars
from octavo.text.tokenizer import Tokenizer, load_tokenizer
from octavo.types import Grammar, TokenizerSource

PADDING = 45
"""Rows of the logits beyond the tokenizer: not a multiple of 32."""

SCHEMAS = [
    {},
    {"type": "object"},
    {"type": "array"},
    {"type": "integer"},
    {"type": "number"},
    {"type": "boolean"},
    {"type": "null"},
    {"type": "string", "maxLength": 12},
    {"type": "string", "minLength": 3, "maxLength": 6},
    {"type": "string", "pattern": "^[a-c]{2,4}$"},
    {"type": "string", "pattern": "b+"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"enum": ["red", "green", 3, None, [1, 2]]},
    {"const": {"a": [1, "x"]}},
    {"type": "integer", "minimum": -3, "maximum": 17},
    {"type": "integer", "exclusiveMinimum": 5},
    {"type": "number", "minimum": 0.5, "exclusiveMaximum": 2},
    {"type": "integer", "multipleOf": 7},
    {"type": ["string", "null"], "maxLength": 4},
    {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    {"type": "object", "additionalProperties": {"type": "boolean"}},
    {"type": "object", "patternProperties": {"^x": {"type": "null"}}, "additionalProperties": False},
    {"type": "object", "minProperties": 1, "maxProperties": 2, "additionalProperties": {"type": "integer"}},
    {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 3}]},
    {"oneOf": [{"type": "boolean"}, {"type": "array", "maxItems": 1}]},
    {"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 9}]},
    {"$defs": {"n": {"enum": [1, 2]}}, "type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 3},
    {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"kid": {"$ref": "#/$defs/tree"}, "v": {"type": "integer"}},
            }
        },
        "$ref": "#/$defs/tree",
    },
    {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}}, "required": ["b"]},
]


@pytest.fixture(scope="session", params=["byte level", "sentencepiece", "tokenizer.model", "runs of spaces"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "byte level":
        made: Tokenizer = request.getfixturevalue("byte_level")
        return made
    processor, metadata = request.getfixturevalue(
        "gemma_like" if request.param == "runs of spaces" else "llama_like"
    )
    if request.param == "tokenizer.model":
        return load_tokenizer(TokenizerSource("sentencepiece", data=processor.serialized_model_proto()))
    return load_tokenizer(TokenizerSource("gguf", metadata=metadata))


@pytest.fixture(scope="session")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(
        tokenizer, vocab_size=tokenizer.vocab_size + PADDING, end_token_ids=tokenizer.end_token_ids
    )


def allowed(constraint: GrammarConstraint) -> list[int]:
    bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
    return [int(token) for token in np.flatnonzero(bits)]


def walk(grammars: Grammars, tokenizer: Tokenizer, grammar: Grammar, seed: int) -> str | None:
    """The text of a random way through the grammar; None where it does not end in 400 tokens."""
    chance, constraint = random.Random(seed), grammars.constraint(grammar)
    taken: list[int] = []
    for _ in range(400):
        may = allowed(constraint)
        assert may, "nothing is allowed, and it is not finished"
        assert max(may) < tokenizer.vocab_size
        ends = tokenizer.end_token_ids.intersection(may)
        control = set(may) & tokenizer.reserved_token_ids - ends
        assert not control, f"control tokens {control} are allowed"
        assert bool(ends) == constraint.complete
        if constraint.finished:
            assert set(may) == ends
        if ends and (len(may) == len(ends) or chance.random() < 0.3):
            return b"".join(tokenizer.token_bytes(t, first=False) or b"" for t in taken).decode()
        text = [token for token in may if token not in ends]
        # Strings and lists would go on for ever if their ends were one choice of a thousand.
        closing = [t for t in text if set(tokenizer.token_bytes(t, first=False) or b"") <= set(b'"]}')]
        taken.append(chance.choice(closing if closing and chance.random() < 0.35 else text))
        constraint.accept(taken[-1])
    return None


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_every_way_through_a_schema_is_valid(
    grammars: Grammars, tokenizer: Tokenizer, schema: object
) -> None:
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    texts = [walk(grammars, tokenizer, Grammar("json_schema", json.dumps(schema)), seed) for seed in range(6)]
    finished = [text for text in texts if text is not None]
    for text in finished:
        validator.validate(json.loads(text))
    assert len(finished) >= 2, "too few ends to say anything"


def test_the_judge_can_refuse() -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(json.loads('{"a": "x"}'), SCHEMAS[23])


@pytest.mark.parametrize(
    "pattern", [r"[a-z]{3,9}", r"(\d{4})-(0[1-9]|1[0-2])", r"é+ü?", r"a|bc*", r"", r"\{\}", r"x/y", "a\nb"]
)
def test_every_way_through_an_expression_matches_it_whole(
    grammars: Grammars, tokenizer: Tokenizer, pattern: str
) -> None:
    for seed in range(5):
        text = walk(grammars, tokenizer, Grammar("regex", pattern), seed)
        assert text is not None
        assert re.fullmatch(pattern, text)


def test_every_way_through_rules_is_one_of_theirs(grammars: Grammars, tokenizer: Tokenizer) -> None:
    lark = 'start: sum\nsum: NUMBER ("+" NUMBER)*\nNUMBER: /[1-9][0-9]?/'
    for seed in range(6):
        text = walk(grammars, tokenizer, Grammar("lark", lark), seed)
        assert text is not None
        assert re.fullmatch(r"[1-9][0-9]?(\+[1-9][0-9]?)*", text)


def test_a_text_can_be_followed_by_its_own_tokens(byte_level: Tokenizer) -> None:
    grammars = Grammars(byte_level, vocab_size=byte_level.vocab_size, end_token_ids=byte_level.end_token_ids)
    constraint = grammars.constraint(Grammar("json_schema", '{"type": "object"}'))
    for token in byte_level.encode('{"naïve": ["🎉", 1.5e3, null]}', parse_special=False):
        assert token in allowed(constraint)
        constraint.accept(token)
    assert constraint.finished


def test_requests_do_not_share_their_place(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = Grammar("regex", "ab")
    first, second = grammars.constraint(grammar), grammars.constraint(grammar)
    before = allowed(second)
    first.accept(allowed(first)[0])
    assert allowed(second) == before
    assert allowed(first) != before


def test_a_token_that_is_not_allowed_is_an_error(grammars: Grammars) -> None:
    constraint = grammars.constraint(Grammar("regex", "[0-9]+"))
    wrong = (set(range(1000)) - set(allowed(constraint))).pop()
    with pytest.raises(InvalidGrammarError):
        constraint.accept(wrong)


def refused() -> Iterator[tuple[str, str, str]]:
    """(kind, text, what the message says)"""
    for keyword, value in {
        "not": {},
        "if": {},
        "uniqueItems": True,
        "contains": {},
        "dependentRequired": {"a": ["b"]},
        "propertyNames": {"pattern": "a"},
        "unevaluatedProperties": False,
        "$dynamicRef": "#a",
    }.items():
        inner = {"type": "object", keyword: value}
        schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"items": inner}}}
        yield "json_schema", json.dumps(schema), f"{keyword} at #/properties/b/items"
    yield "json_schema", '{"x-guidance": {"lenient": true}, "not": {}}', "not at #"
    yield (
        "json_schema",
        '{"properties": {"d": {"type": "string", "format": "nonsense"}}}',
        "at #/properties/d: Unknown",
    )
    yield "json_schema", '{"items": {"type": "string", "pattern": "a("}}', "at #/items: unclosed group"
    yield "json_schema", '{"oneOf": [{"type": "number"}, {"type": "integer"}]}', "oneOf"
    yield "json_schema", '{"$ref": "http://elsewhere/x"}', "elsewhere"
    yield "json_schema", '{"type": "integer", "minimum": 3, "maximum": 2}', "minimum"
    yield "json_schema", "5", "not a JSON object"
    yield "regex", "[ab", "character 0: unclosed character class"
    yield "regex", "a(?=b)", "character 1: look-around"
    yield "regex", r"(a)\1", "character 3: backreferences"
    yield "regex", "(" * 5000, "unclosed group"
    yield "regex", r"\bfoo", "WordUnicode"
    yield "lark", "start: FOO", "line 1, column 8: unknown name"
    yield "lark", 'foo: "a"', "start"
    yield "lark", 'start: "a" <|im_start|>', "line 1, a special token"
    yield "lark", '// <x>\nstart: "<" /<x>/ a\na: <[7]>', "line 3, a special token"
    yield "lark", "start: /a\n/ <[7]> /b/", "line 2, a special token"
    yield "lark", 'start: "a" a # /\na: <[7]> # /', "line 2, a special token"
    yield "lark", '# "\nstart: /a\n/ <[7]> /b/', "line 3, a special token"
    yield "lark", 'start: a\na[temperature=0.5]: "b"', "line 2, temperature"
    yield "lark", 'start: a\na[capture]: "b"', "capture"
    yield "lark", 'start: a\na[stop="x"]: /.*/', "stop"
    yield "lark", '%llguidance {}\nstart: "a"', "%llguidance"
    yield "lark", 'start: %json {"x-guidance": {"lenient": true}, "not": {}}', "not"


@pytest.mark.parametrize(("kind", "text", "said"), list(refused()), ids=lambda value: str(value)[:40])
def test_what_cannot_be_kept_is_refused_with_its_place(
    grammars: Grammars, kind: str, text: str, said: str
) -> None:
    with pytest.raises(InvalidGrammarError) as caught:
        grammars.check(Grammar(kind, text))  # type: ignore[arg-type]
    assert said in caught.value.message
    assert len(caught.value.message) < 400
    assert caught.value.remedy


def test_angles_in_texts_are_no_special_tokens(grammars: Grammars) -> None:
    grammars.check(Grammar("lark", 'start: "<b>" /<i>/ // <u>'))


def test_a_model_without_a_stop_token_cannot_end_a_grammar(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, vocab_size=tokenizer.vocab_size, end_token_ids=())
    with pytest.raises(InvalidGrammarError, match="no stop token"):
        grammars.check(Grammar("regex", "a"))


def test_a_mask_costs_microseconds_and_no_memory(grammars: Grammars) -> None:
    constraint = grammars.constraint(Grammar("json_schema", '{"type": "object"}'))
    assert constraint.mask() is constraint.mask()
    assert (constraint.mask().dtype, constraint.mask().ndim) == (np.uint32, 1)
