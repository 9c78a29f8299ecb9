"""Calls of tools under a grammar: whatever is chosen, the parser finds calls whose arguments follow their schemas."""

from __future__ import annotations

import json
import random

import jsonschema
import numpy as np
import pytest

from octavo.errors import InvalidGrammarError
from octavo.text.answer import REASONING_BEGIN, REASONING_END, AnswerForm, Said
from octavo.text.detokenizer import Detokenizer
from octavo.text.grammar import Grammars
from octavo.text.tokenizer import load_tokenizer
from octavo.text.tool_syntax import HERMES, LLAMA3, MISTRAL
from octavo.text.tool_use import ToolUse, can_hold, grammar_of_calls
from octavo.types import Grammar, TokenizerSource

SCHEMAS = {
    "add": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["<tool_call>", '"', "ü"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    "add_all": {"type": "object", "properties": {"x": {"type": "array", "items": {"type": "boolean"}}}},
    "stop": {"type": "object", "properties": {}, "additionalProperties": False},
}
TOOLS = tuple(
    {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()
)
MARKERS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", REASONING_BEGIN, REASONING_END)


def tokenizer_with(byte_level_json, markers):
    made = json.loads(byte_level_json)
    made["added_tokens"] = [token for token in made["added_tokens"] if "think" not in token["content"]]
    first = 1 + max(*(made["model"]["vocab"].values()), *(token["id"] for token in made["added_tokens"]))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    made["added_tokens"] += [
        {"id": first + place, "content": marker, "special": True, **flags}
        for place, marker in enumerate(markers)
    ]
    return load_tokenizer(TokenizerSource("tokenizer.json", json.dumps(made).encode()))


@pytest.fixture(scope="module")
def marked(byte_level_json):
    return tokenizer_with(byte_level_json, MARKERS)


@pytest.fixture(scope="module")
def unmarked(byte_level_json):
    return tokenizer_with(byte_level_json, ())


def form_of(syntax, tokenizer, use, markers=MARKERS, **more):
    shown = {marker: id_ for marker in markers if (id_ := tokenizer.added_tokens.get(marker)) is not None}
    return AnswerForm(
        syntax=syntax,
        tools=frozenset(tool["function"]["name"] for tool in use.callable),
        single_call=not use.several,
        shown=shown,
        **more,
    )


def walk(tokenizer, grammar, form, seed):
    """What a random way through the grammar says, read by the form's parser; None where it does not end."""
    end = tokenizer.added_tokens["<|im_end|>"]
    constraint = Grammars(tokenizer, vocab_size=tokenizer.vocab_size, end_token_ids=[end]).constraint(grammar)
    chance, said = random.Random(seed), Said()
    parser, detokenizer = (
        form.parser(),
        Detokenizer(tokenizer, continuation=True, shown=frozenset(form.shown.values())),
    )
    for _ in range(600):
        bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
        may = [int(token) for token in np.flatnonzero(bits)]
        assert set(may) & tokenizer.reserved_token_ids <= {end, *form.shown.values()}
        if end in may and (len(may) == 1 or chance.random() < 0.2):
            said.take([*parser.push(detokenizer.finish()), *parser.finish()])
            return said
        text = [token for token in may if token != end]
        closing = [t for t in text if set(tokenizer.token_bytes(t, first=False) or b"x") <= set(b'"]}')]
        closing += [t for t in text if t in form.shown.values()]
        token = chance.choice(closing if closing and chance.random() < 0.35 else text)
        constraint.accept(token)
        said.take(parser.push(detokenizer.push(token)))
    return None


SYNTAXES = {
    "hermes": (HERMES, MARKERS),
    "llama3": (LLAMA3, ()),
    "mistral, a list": (MISTRAL, ("[TOOL_CALLS]",)),
    "mistral, named": (MISTRAL, ("[TOOL_CALLS]", "[ARGS]")),
}


@pytest.mark.parametrize("use", [ToolUse(TOOLS, required=True), ToolUse(TOOLS, required=True, only="add")])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_forced_calls_are_calls_and_follow_their_schemas(marked, unmarked, syntax, use):
    family, markers = SYNTAXES[syntax]
    for tokenizer in (marked, *((unmarked,) if syntax == "hermes" else ())):
        form = form_of(family, tokenizer, use, markers)
        answers = [walk(tokenizer, grammar_of_calls(form, use), form, seed) for seed in range(6)]
        assert any(answers)
        for said in filter(None, answers):
            assert said.calls
            assert said.content == ""
            for name, arguments in said.calls:
                assert use.only in (None, name)
                jsonschema.validate(json.loads("".join(arguments)), SCHEMAS[name])


def test_strict_calls_may_come_in_text(marked, unmarked):
    use = ToolUse(TOOLS, arguments="strict")
    form = form_of(HERMES, marked, use)
    assert can_hold(form)
    assert not can_hold(form_of(HERMES, unmarked, use))
    answers = [walk(marked, grammar_of_calls(form, use), form, seed) for seed in range(30)]
    found = [said for said in answers if said is not None]
    assert any(said.calls for said in found)
    assert any(said.content and not said.calls for said in found)
    for said in found:
        for name, arguments in said.calls:
            jsonschema.validate(json.loads("".join(arguments)), SCHEMAS[name])


@pytest.mark.parametrize("marked_or_not", ["marked", "unmarked"])
@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", json.dumps(SCHEMAS["add"])),
        Grammar("regex", "[0-9]{3}"),
        Grammar("lark", 'start: "yes" | NO\nNO: "no"'),
    ],
    ids=lambda grammar: getattr(grammar, "kind", ""),
)
def test_what_follows_the_reasoning_matches(request, marked_or_not, opened, grammar):
    tokenizer = request.getfixturevalue(marked_or_not)
    form = form_of(None, tokenizer, ToolUse(), thinks=True, thinking=opened)
    whole = Grammar(grammar.kind, grammar.text, after_reasoning="yes" if opened else "maybe")
    grammars = Grammars(
        tokenizer,
        vocab_size=tokenizer.vocab_size,
        end_token_ids=[tokenizer.added_tokens["<|im_end|>"]],
    )
    content = {"json_schema": '{"a":1,"b":"ü"}', "regex": "123", "lark": "no"}[grammar.kind]

    def takes(text):
        constraint, parser, said = grammars.constraint(whole), form.parser(), Said()
        for token in tokenizer.encode(text, parse_special=True):
            constraint.accept(token)
        said.take([*parser.push(text), *parser.finish()])
        return constraint.complete, said

    begin = "" if opened else REASONING_BEGIN
    done, said = takes(f'{begin}\nHm: {{"a": or no?\n{REASONING_END}\n\n{content}')
    assert done
    assert (said.reasoning, said.content) == ('Hm: {"a": or no?', content)
    with pytest.raises(InvalidGrammarError):
        takes(f"{begin}Hm{REASONING_END}\n\n!")
    if opened:
        assert not takes(f"{begin}Hm, {content}")[0]
    else:
        assert takes(content)[0]


def test_a_schema_of_a_tool_that_cannot_be_kept_is_refused(marked):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}
    use = ToolUse((tool,), required=True)
    grammars = Grammars(
        marked, vocab_size=marked.vocab_size, end_token_ids=[marked.added_tokens["<|im_end|>"]]
    )
    with pytest.raises(InvalidGrammarError, match="schemas of the tools"):
        grammars.check(grammar_of_calls(form_of(HERMES, marked, use), use))


def test_a_schema_cannot_loosen_its_own_rules(marked):
    """llguidance reads options from the schema: a caller's are replaced."""
    parameters = {"type": "object", "not": {}, "x-guidance": {"lenient": True}}
    use = ToolUse(({"type": "function", "function": {"name": "f", "parameters": parameters}},), required=True)
    assert '"lenient": true' not in grammar_of_calls(form_of(HERMES, marked, use), use).text
