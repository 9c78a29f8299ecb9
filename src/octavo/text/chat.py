"""Chat messages -> prompt ids, through the model's own template; message text never becomes a control token.

The template is rendered once, on the real messages, by an environment that remembers which characters the
template itself wrote (`octavo.text.template_environment`); only those can become control tokens
(`octavo.text.rendered_encoding`). Shortening a chat that is too long is `octavo.text.chat_history`'s work.
"""

from __future__ import annotations

import secrets
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from octavo.errors import ChatTemplateError, InvalidInputError, OctavoError
from octavo.text.provenance import TemplateText
from octavo.text.rendered_encoding import encode_rendered
from octavo.text.tokenizer import Tokenizer, check_text
from octavo.types import Message

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles a message may have. Templates build control tokens from roles, so there are no others."""

MAX_TEMPLATE_CHARACTERS = 1 << 18
MAX_NAMED_TOKENS = 5
"""In a notice about them."""

_NO_TEMPLATE = "Use --raw to continue the text as it is, or choose an instruct model."


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A prompt, ready for the engine."""

    token_ids: tuple[int, ...]
    """With BOS exactly once if the tokenizer adds one."""
    text: str
    """What the template made of the messages."""
    notices: tuple[str, ...] = ()
    """What the user should know was done to the messages."""


class ChatTemplate:
    """A compiled chat template. Safe to use from several threads."""

    def __init__(self, template: str | None, tokenizer: Tokenizer) -> None:
        """Raises ChatTemplateError where the model has no template, or one that does not compile."""
        if not template:
            raise ChatTemplateError("the model has no chat template", remedy=_NO_TEMPLATE)
        if len(template) > MAX_TEMPLATE_CHARACTERS:
            raise ChatTemplateError(
                f"the model's chat template has {len(template):,} characters (limit {MAX_TEMPLATE_CHARACTERS:,})",
                remedy=_NO_TEMPLATE,
            )
        from octavo.text.template_environment import TemplateEnvironment

        self._tokenizer = tokenizer
        self._environment = TemplateEnvironment()
        try:
            self._template = self._environment.from_string(template)
        except Exception as error:  # whatever Jinja's parser and code generator make of a hostile source
            raise _broken(error) from error

    # --- messages -> prompt ---

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> RenderedPrompt:
        """The prompt for these messages, up to where the assistant's answer starts.

        A system message that the template cannot place becomes the start of the first user message, with a
        notice. BOS comes once: as the template writes it, or in front if the tokenizer adds one and the
        template does not.

        Raises InvalidInputError for messages that are malformed or that the template refuses, NotTextError for
        lone surrogates, ChatTemplateError for a template that fails or exceeds its limits.
        """
        _check(messages)
        notices = []
        if messages[0]["role"] == "system" and self._system_messages != "kept":
            messages = _merge_system(messages)
            notices.append(
                "the model's chat template has no place for a system message: it was put at the start of the "
                "first user message"
            )
        text = self._rendered(messages, add_generation_prompt)
        token_ids, forged = encode_rendered(self._tokenizer, text)
        if forged:
            named = ", ".join(forged[:MAX_NAMED_TOKENS]) + (" ..." if len(forged) > MAX_NAMED_TOKENS else "")
            notices.append(f"message text that spells control tokens was sent as plain text: {named}")
        return RenderedPrompt(tuple(self._tokenizer.begin(token_ids)), str.__str__(text), tuple(notices))

    def _rendered(self, messages: Sequence[Message], add_generation_prompt: bool) -> TemplateText:
        from octavo.text.template_environment import TemplateRefusal
        from octavo.text.template_limits import RenderBudget

        variables = {
            **{name: TemplateText(spelling) for name, spelling in self._tokenizer.named_tokens.items()},
            "messages": [
                {"role": TemplateText(message["role"]), "content": str(message["content"])}
                for message in messages
            ],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        budget = RenderBudget(sum(len(message["content"]) for message in messages))
        try:
            return self._environment.render(self._template, variables, budget)
        except TemplateRefusal as error:
            raise InvalidInputError(
                f"the model's chat template refuses these messages: {error.message}",
                remedy="Start with a user message (after an optional system message), then alternate assistant "
                "and user.",
            ) from error
        except Exception as error:  # a template is a program: it may raise anything
            raise _broken(error) from error

    # --- what the template is like ---

    @cached_property
    def _system_messages(self) -> Literal["kept", "dropped", "refused"]:
        """What the template does with a system message, tried on a sentinel."""
        sentinel = secrets.token_hex(16)
        try:
            text = self._rendered(
                [{"role": "system", "content": sentinel}, {"role": "user", "content": "?"}], True
            )
        except OctavoError:
            return "refused"
        return "kept" if sentinel in text else "dropped"

    def end_of_turn_token_ids(self) -> frozenset[int]:
        """The control token the template writes right after an assistant's message, if it writes one."""
        sentinel = secrets.token_hex(16)
        chat: list[Message] = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": sentinel},
        ]
        try:
            _, _, rest = str.__str__(self._rendered(chat, False)).partition(sentinel)
        except OctavoError:
            return frozenset()
        for token_id, (_, end) in zip(*self._tokenizer.encode_with_offsets(rest), strict=True):
            if token_id in self._tokenizer.special_token_ids:
                return frozenset({token_id})
            if rest[:end].strip():
                break
        return frozenset()


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise InvalidInputError("there are no messages", remedy="Pass at least one user message.")
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InvalidInputError(
                f"message {number} has the role {role!r:.50}", remedy=f"Use one of {', '.join(ROLES)}."
            )
        if not isinstance(content, str):
            raise InvalidInputError(
                f"the content of message {number} is {type(content).__name__}, not text",
                remedy="Pass each message's content as a string.",
            )
        check_text(content)


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


def _broken(error: Exception) -> ChatTemplateError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return ChatTemplateError(
        f"the model's chat template cannot be used: {textwrap.shorten(reason, 300)}",
        remedy=_NO_TEMPLATE,
    )
