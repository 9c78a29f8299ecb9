"""Lark rules that allow calls of tools and nothing else, or free text and sound calls: arguments follow their schemas.

The text between a call's markers is what `octavo.text.tool_syntax` says the family writes. A marker that is a control
token is named by its id, which no grammar of a caller's may do. Compiling is `octavo.text.grammar`'s work.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.text.tool_syntax import ARGUMENTS_MARK, ToolSyntax
from octavo.types import Tool

_SCHEMA_OPTIONS = "x-guidance"
"""llguidance's own key; a caller's is replaced."""


def tool_grammar(
    syntax: ToolSyntax,
    tools: Sequence[Tool],
    *,
    shown: Mapping[str, int],
    several: bool,
    text_allowed: bool,
    schema_options: Mapping[str, Any],
) -> str:
    """Lark, with `start`. `shown`: control tokens of the vocabulary, spelling -> id. `several`: more calls than one.

    `text_allowed`: the answer may be text, or have text before its calls. Where the marker that opens a call is no
    control token, text that comes before a call cannot be told from it, so an answer is then one or the other.
    `schema_options`: how JSON is to be written, in llguidance's words.
    """

    def mark(spelling: str) -> str:
        return f"<[{shown[spelling]}]>" if spelling in shown else json.dumps(spelling)

    rules = []
    named = syntax.name == "mistral" and ARGUMENTS_MARK in shown
    for place, tool in enumerate(tools):
        function = tool["function"]
        schema = json.dumps({**function["parameters"], _SCHEMA_OPTIONS: dict(schema_options)})
        if named:
            rules.append(
                f"call_{place}: {json.dumps(function['name'])} {mark(ARGUMENTS_MARK)} %json {schema}"
            )
        else:
            head = f'{{"name": {json.dumps(function["name"])}, "{syntax.arguments_key}": '
            rules.append(f'call_{place}: {json.dumps(head)} %json {schema} "}}"')
    one = "(" + " | ".join(f"call_{place}" for place in range(len(tools))) + ")"
    match syntax.name:
        case "hermes":
            section = f'{mark(syntax.begin)} "\\n" {one} "\\n" {mark(syntax.end)}'
            again = '("\\n" section)*'
        case "mistral" if named:
            section = f"{mark(syntax.begin)} {one}"
            again = "section*"
        case "mistral":
            more = f'(", " {one})*' if several else ""
            section = f'{mark(syntax.begin)} " "? "[" {one} {more} "]"'
            again = ""
        case "llama3":
            section, again = one, ""
    calls = f"section {again if several else ''}"
    if not text_allowed:
        start = calls
    elif syntax.bare:
        start = f"{calls} | other"
    else:
        start = f"text? | text? {calls}"
    free = ["text: /(?s:.+)/", "other: /(?s:[ \\t\\r\\n]*([^{ \\t\\r\\n].*)?)/"] if text_allowed else []
    used = [rule for rule in free if rule.startswith("other" if syntax.bare else "text")]
    return "\n".join((f"start: {start}", f"section: {section}", *rules, *used)) + "\n"
