"""Chat messages -> prompt ids, through the model's own template; message text never becomes a control token.

The template is rendered once, on the real messages, by an environment that remembers which characters the
template itself wrote (`octavo.text.template_environment`); only those can become control tokens
(`octavo.text.rendered_encoding`). Shortening a chat that is too long is `octavo.text.chat_history`'s work.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal

from octavo.errors import ChatTemplateError, InvalidInputError
from octavo.text.answer import REASONING_BEGIN, REASONING_END
from octavo.text.provenance import TemplateText
from octavo.text.rendered_encoding import encode_rendered
from octavo.text.template_rendering import NO_TEMPLATE_REMEDY, LocalRenderer, MakeRenderer, Rendering
from octavo.text.template_variables import check_messages
from octavo.text.tokenizer import Tokenizer
from octavo.text.tool_syntax import MISTRAL, ToolSyntax, tool_syntax_of
from octavo.types import Message, TemplateOptions, Tool

MAX_TEMPLATE_CHARACTERS = 1 << 18
MAX_NAMED_TOKENS = 5
"""In a notice about them."""
_REFUSALS = (ChatTemplateError, InvalidInputError)
"""What a template may answer a trial with. Whatever else comes of one says nothing about the template."""


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A prompt, ready for the engine."""

    token_ids: tuple[int, ...]
    """With BOS exactly once if the tokenizer adds one."""
    text: str
    """What the template made of the messages."""
    notices: tuple[str, ...] = ()
    """What the user should know was done to the messages."""

    @property
    def thinking(self) -> bool:
        """Whether the prompt ends within a block of reasoning that the answer goes on with."""
        return self.text.rstrip().endswith(REASONING_BEGIN)

    @property
    def thought(self) -> bool:
        """Whether the prompt ends with a block that is closed: the answer is to come without reasoning."""
        return self.text.rstrip().endswith(REASONING_END)


class ChatTemplate:
    """A compiled chat template. Safe to use from several threads."""

    def __init__(
        self, template: str | None, tokenizer: Tokenizer, *, make_renderer: MakeRenderer = LocalRenderer
    ) -> None:
        """Raises ChatTemplateError where the model has no template, or one that does not compile."""
        if not template:
            raise ChatTemplateError("the model has no chat template", remedy=NO_TEMPLATE_REMEDY)
        if len(template) > MAX_TEMPLATE_CHARACTERS:
            raise ChatTemplateError(
                f"the model's chat template has {len(template):,} characters (limit {MAX_TEMPLATE_CHARACTERS:,})",
                remedy=NO_TEMPLATE_REMEDY,
            )
        self._tokenizer = tokenizer
        self._source = template
        self._system_places: dict[bool, Literal["kept", "dropped", "refused"]] = {}
        self._renderer = make_renderer(template)

    # --- messages -> prompt ---

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        options: TemplateOptions = MappingProxyType({}),
        add_generation_prompt: bool = True,
    ) -> RenderedPrompt:
        """The prompt for these messages, up to where the assistant's answer starts.

        `tools`: definitions the template shows to the model. `options`: variables of the template.

        A system message that the template cannot place becomes the start of the first user message, with a
        notice. BOS comes once: as the template writes it, or in front if the tokenizer adds one and the
        template does not.

        Raises InvalidInputError for messages that are malformed or that the template refuses, and for tools that
        it would leave out; NotTextError for lone surrogates; ChatTemplateError for a template that fails or
        exceeds its limits.
        """
        check_messages(messages)
        if tools and not self.takes_tools:
            raise InvalidInputError(
                "the model's chat template has no place for tools",
                remedy="Leave tools out, or choose a model that was trained to call them.",
            )
        notices = []
        if messages[0]["role"] == "system" and self._system_messages(bool(tools)) != "kept":
            messages = _merge_system(messages)
            notices.append(
                "the model's chat template has no place for a system message: it was put at the start of the "
                "first user message"
            )
        text = self._rendered(messages, add_generation_prompt, tools, options)
        token_ids, forged = encode_rendered(self._tokenizer, text)
        if forged:
            named = ", ".join(forged[:MAX_NAMED_TOKENS]) + (" ..." if len(forged) > MAX_NAMED_TOKENS else "")
            notices.append(f"message text that spells control tokens was sent as plain text: {named}")
        return RenderedPrompt(tuple(self._tokenizer.begin(token_ids)), str.__str__(text), tuple(notices))

    def _rendered(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Tool] = (),
        options: TemplateOptions = MappingProxyType({}),
    ) -> TemplateText:
        calls = any(message.get("tool_calls") for message in messages)
        if calls and self._wants_arguments_as_text:
            return self._render(messages, add_generation_prompt, tools, options, arguments_as_text=True)
        return self._render(messages, add_generation_prompt, tools, options, arguments_as_text=False)

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Tool],
        options: TemplateOptions,
        *,
        arguments_as_text: bool,
    ) -> TemplateText:
        return self._renderer.render(
            Rendering(
                tuple(messages),
                tuple(tools),
                options,
                self._tokenizer.named_tokens,
                add_generation_prompt=add_generation_prompt,
                developer_as_system="developer" not in self._source,
                arguments_as_text=arguments_as_text,
                short_call_ids=self.tool_syntax is MISTRAL,
            )
        )

    # --- what the template is like ---

    def _system_messages(self, with_tools: bool) -> Literal["kept", "dropped", "refused"]:
        """What the template does with a system message, tried on a sentinel once."""
        if with_tools not in self._system_places:
            sentinel = secrets.token_hex(16)
            chat: list[Message] = [{"role": "system", "content": sentinel}, {"role": "user", "content": "?"}]
            try:
                text = self._rendered(chat, True, [_tool("f")] if with_tools else [])
                self._system_places[with_tools] = "kept" if sentinel in text else "dropped"
            except _REFUSALS:
                self._system_places[with_tools] = "refused"
        return self._system_places[with_tools]

    @property
    def thinks(self) -> bool:
        """Whether the template knows of reasoning before an answer."""
        return REASONING_END in self._source

    def mentions(self, variable: str) -> bool:
        """Whether the template's source has this name: then setting the variable may change something."""
        return re.search(rf"\b{re.escape(variable)}\b", self._source) is not None

    @property
    def tool_syntax(self) -> ToolSyntax | None:
        """How the model writes calls of tools; None: not at all, or in a way that is not read here."""
        return tool_syntax_of(self._source)

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the template shows the model what tools there are, tried on a sentinel."""
        sentinel = f"f{secrets.token_hex(16)}"
        try:
            return sentinel in self._rendered([{"role": "user", "content": "?"}], True, [_tool(sentinel)])
        except _REFUSALS:
            return False

    @cached_property
    def _wants_arguments_as_text(self) -> bool:
        """Whether the template fails on, or leaves out, the arguments of a call that are an object."""
        sentinel = secrets.token_hex(16)
        arguments = json.dumps({"x": sentinel})
        chat: list[Message] = [
            {"role": "user", "content": "?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": arguments}}
                ],
            },
            {"role": "tool", "content": "?", "tool_call_id": "call00000", "name": "f"},
        ]

        def placed(as_text: bool) -> bool:
            try:
                text = self._render(chat, True, (), MappingProxyType({}), arguments_as_text=as_text)
            except _REFUSALS:
                return False
            return sentinel in text

        return not placed(False) and placed(True)

    def end_of_turn_token_ids(self) -> frozenset[int]:
        """The control token the template writes right after an assistant's message, if it writes one."""
        sentinel = secrets.token_hex(16)
        chat: list[Message] = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": sentinel},
        ]
        try:
            _, _, rest = str.__str__(self._rendered(chat, False)).partition(sentinel)
        except _REFUSALS:
            return frozenset()
        for token_id, (_, end) in zip(*self._tokenizer.encode_with_offsets(rest), strict=True):
            if token_id in self._tokenizer.special_token_ids:
                return frozenset({token_id})
            if rest[:end].strip():
                break
        return frozenset()


def _merge_system(messages: Sequence[Message]) -> list[Message]:
    """The system messages at the start, with a blank line after each, before the first user message's text."""
    leading = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    rest = list(messages[leading:])
    if not rest or rest[0]["role"] != "user":
        raise InvalidInputError(
            "the model's chat template has no place for a system message, and no user message follows it",
            remedy="Add a user message after the system message.",
        )
    texts = [message["content"] for message in (*messages[:leading], rest[0])]
    rest[0] = {"role": "user", "content": "\n\n".join(texts)}
    return rest


def _tool(name: str) -> Tool:
    schema = {
        "type": "object",
        "properties": {"x": {"type": "string", "description": "?"}},
        "required": ["x"],
    }
    return {"type": "function", "function": {"name": name, "description": "?", "parameters": schema}}
