"""Messages and tools as a chat template sees them: what the caller wrote stays plain text, whatever it spells.

Roles are the template's own text, since templates build control tokens from them; everything else a caller
gives (content, names, arguments, definitions of tools) is a plain string, which never becomes a control token.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.errors import InvalidInputError
from octavo.text.provenance import TemplateText
from octavo.text.tokenizer import check_text
from octavo.types import Message, Tool, ToolCall

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles a message may have. Templates build control tokens from roles, so there are no others."""

_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")


def check_messages(messages: Sequence[Message]) -> None:
    """Raises InvalidInputError for messages that are malformed, NotTextError for lone surrogates.

    `octavo.validate` checks what a user gave in full; this guards what control tokens are made from.
    """
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
        for text in _texts(message):
            check_text(text)


def message_variables(
    messages: Sequence[Message],
    *,
    developer_as_system: bool,
    arguments_as_text: bool,
    short_call_ids: bool,
) -> list[dict[str, Any]]:
    """What a template gets as `messages`.

    `arguments_as_text`: the arguments of earlier calls as JSON text instead of as objects; templates want one or
    the other, most of them objects. `short_call_ids`: ids of calls as nine letters and digits, the only ones that
    Mistral's templates take.
    """
    made = []
    for message in messages:
        role = message["role"]
        if role == "developer" and developer_as_system:
            role = "system"
        variables: dict[str, Any] = {"role": TemplateText(role), "content": str(message["content"])}
        for key in ("reasoning_content", "tool_call_id", "name"):
            if key in message:
                variables[key] = str(message[key])
        if short_call_ids and "tool_call_id" in variables:
            variables["tool_call_id"] = _short(variables["tool_call_id"])
        if message.get("tool_calls"):
            calls = variables["tool_calls"] = [
                _call(call, arguments_as_text) for call in message["tool_calls"]
            ]
            if short_call_ids:
                for call in calls:
                    call["id"] = _short(call["id"])
        made.append(variables)
    return made


def tool_variables(tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
    """What a template gets as `tools`: plain copies; None where there are none."""
    return [json.loads(json.dumps(tool)) for tool in tools] or None


def input_characters(messages: Sequence[Message], tools: Sequence[Tool]) -> int:
    """How much the caller wrote: a template's limits grow with it."""
    in_messages = sum(len(text) for message in messages for text in _texts(message))
    return in_messages + (len(json.dumps(list(tools), ensure_ascii=False)) if tools else 0)


def _call(call: ToolCall, arguments_as_text: bool) -> dict[str, Any]:
    function = call["function"]
    arguments: Any = str(function["arguments"])
    if not arguments_as_text:
        arguments = json.loads(arguments) if arguments else {}
    return {
        "id": str(call["id"]),
        "type": TemplateText("function"),
        "function": {"name": str(function["name"]), "arguments": arguments},
    }


def _short(call_id: str) -> str:
    """The same id each time; one that is short enough stays."""
    if _SHORT_ID.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _texts(message: Mapping[str, Any]) -> list[str]:
    calls = message.get("tool_calls", ())
    named = [
        message[key] for key in ("content", "reasoning_content", "tool_call_id", "name") if key in message
    ]
    return named + [text for call in calls for text in (call["id"], *call["function"].values())]
