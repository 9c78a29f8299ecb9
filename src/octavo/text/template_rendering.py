"""One rendering of a chat template: what it is given, and who does it.

`LocalRenderer` runs the template in this process, within the limits of `octavo.text.template_limits`. A server has
another one, which runs it in a process that can be killed. What a template is rendered for, and what becomes of its
text, is the business of `octavo.text.chat`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from octavo.errors import ChatTemplateError, InvalidInputError
from octavo.text.provenance import TemplateText
from octavo.text.template_variables import input_characters, message_variables, tool_variables
from octavo.types import Message, TemplateOptions, Tool

NO_TEMPLATE_REMEDY = "Use --raw to continue the text as it is, or choose an instruct model."


@dataclass(frozen=True, slots=True)
class Rendering:
    """What a template is rendered with; the messages are checked."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    options: TemplateOptions = field(default_factory=dict)
    """Variables of the template that the caller sets."""
    named_tokens: Mapping[str, str] = field(default_factory=dict)
    """bos_token and so on: the tokenizer's spellings."""
    add_generation_prompt: bool = True
    developer_as_system: bool = False
    arguments_as_text: bool = False
    """Whether the arguments of earlier calls are JSON text instead of objects."""
    short_call_ids: bool = False


class Renderer(Protocol):
    """A compiled template. Called from several threads."""

    def render(self, asked: Rendering) -> TemplateText:
        """Raises InvalidInputError where the template refuses the messages, ChatTemplateError where it fails or
        exceeds its limits."""


MakeRenderer = Callable[[str], Renderer]
"""The source of a template -> its renderer. Raises ChatTemplateError where it does not compile."""


class LocalRenderer:
    """Renders in this process."""

    def __init__(self, source: str) -> None:
        """Raises ChatTemplateError for a source that does not compile."""
        from octavo.text.template_environment import TemplateEnvironment

        self._environment = TemplateEnvironment()
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:  # whatever Jinja's parser and code generator make of a hostile source
            raise broken_template(_reason(error)) from error

    def render(self, asked: Rendering) -> TemplateText:
        """As `Renderer.render`."""
        from octavo.text.template_environment import TemplateRefusal
        from octavo.text.template_limits import RenderBudget

        variables = {
            **asked.options,
            **{name: TemplateText(spelling) for name, spelling in asked.named_tokens.items()},
            "messages": message_variables(
                asked.messages,
                developer_as_system=asked.developer_as_system,
                arguments_as_text=asked.arguments_as_text,
                short_call_ids=asked.short_call_ids,
            ),
            "tools": tool_variables(asked.tools),
            "documents": None,
            "add_generation_prompt": asked.add_generation_prompt,
        }
        budget = RenderBudget(input_characters(asked.messages, asked.tools))
        try:
            return self._environment.render(self._template, variables, budget)
        except TemplateRefusal as error:
            raise InvalidInputError(
                f"the model's chat template refuses these messages: {error.message}",
                remedy="Start with a user message (after an optional system message), then alternate assistant "
                "and user.",
            ) from error
        except Exception as error:  # a template is a program: it may raise anything
            raise broken_template(_reason(error)) from error


def broken_template(reason: str) -> ChatTemplateError:
    """The error of a template that cannot be used."""
    return ChatTemplateError(
        f"the model's chat template cannot be used: {textwrap.shorten(reason, 300)}",
        remedy=NO_TEMPLATE_REMEDY,
    )


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
