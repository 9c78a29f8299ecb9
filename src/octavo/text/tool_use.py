"""What a request says of tools, and how the text of its answer is to be read: one plan for prompt, grammar and parser.

The definitions are checked (`octavo.validate.tools`), the template's syntax is known (`octavo.text.tool_syntax`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from octavo.text.answer import REASONING_BEGIN, REASONING_END, AnswerForm
from octavo.text.chat import ChatTemplate, RenderedPrompt
from octavo.text.grammar import SCHEMA_OPTIONS
from octavo.text.tokenizer import Tokenizer
from octavo.text.tool_grammar import tool_grammar
from octavo.text.tool_syntax import ARGUMENTS_MARK, CALL_ID_MARK
from octavo.types import Grammar, Tool


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Tools that are shown to the model, and what it may do with them."""

    tools: tuple[Tool, ...] = ()
    required: bool = False
    """The answer is calls and nothing else."""
    only: str | None = None
    """With `required`: the one tool to call, once."""
    several: bool = True
    arguments: Literal["free", "held", "strict"] = "free"
    """Without `required`: whether calls within free text are held to their schemas: not, where that can be done, or
    else the request is refused. `required` is always strict."""

    @property
    def strict(self) -> bool:
        return self.required or self.arguments == "strict"

    @property
    def callable(self) -> tuple[Tool, ...]:
        return tuple(tool for tool in self.tools if self.only in (None, tool["function"]["name"]))


NO_TOOLS = ToolUse()


def answer_form(
    template: ChatTemplate, tokenizer: Tokenizer, rendered: RenderedPrompt, use: ToolUse
) -> AnswerForm:
    """What the answer to `rendered` may be made of."""
    syntax = template.tool_syntax if use.tools else None
    spellings: tuple[str, ...] = ()
    if syntax is not None:
        spellings += syntax.begin, syntax.end
        if syntax.name == "mistral":
            spellings += ARGUMENTS_MARK, CALL_ID_MARK
    if template.thinks:
        spellings += REASONING_BEGIN, REASONING_END
    found = {spelling: tokenizer.added_tokens.get(spelling) for spelling in spellings}
    return AnswerForm(
        syntax=syntax,
        tools=frozenset(tool["function"]["name"] for tool in use.callable),
        single_call=not use.several,
        thinks=template.thinks,
        thinking=template.thinks and rendered.thinking,
        shown={
            spelling: token
            for spelling, token in found.items()
            if token is not None and token in tokenizer.reserved_token_ids
        },
    )


def grammar_of_calls(form: AnswerForm, use: ToolUse) -> Grammar | None:
    """What holds calls to the schemas of their tools; None: nothing does."""
    if form.syntax is None or not (use.required or use.arguments != "free"):
        return None
    text = tool_grammar(
        form.syntax,
        use.callable,
        shown=form.shown,
        several=use.several and use.only is None,
        text_allowed=not use.required,
        schema_options=SCHEMA_OPTIONS,
    )
    return Grammar("tool_calls", text)


def can_hold(form: AnswerForm) -> bool:
    """Whether calls within free text can be held to schemas: where text can be told from the start of a call."""
    return form.syntax is not None and (form.syntax.bare or form.syntax.begin in form.shown)
