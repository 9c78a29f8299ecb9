"""The messages of a chat as they come over HTTP -> ours: text parts joined, calls kept, the rest refused by name.

Values are checked by `octavo.validate.validate_messages`, when they are rendered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from octavo.server.faults import bad_request, unsupported
from octavo.server.schema import ChatMessage, OtherPart
from octavo.server.settings import ServerSettings
from octavo.types import Message


def plain_messages(messages: Sequence[ChatMessage], limits: ServerSettings) -> list[Message]:
    """Role and text of each, and what tools were called and said. Raises HttpFault naming what is no text."""
    if len(messages) > limits.max_messages:
        raise bad_request(
            f"{len(messages)} messages; at most {limits.max_messages} are taken", param="messages"
        )
    called: dict[str, str] = {}
    made = []
    for place, message in enumerate(messages):
        made.append(_plain(f"messages[{place}]", message, called))
    return made


def _plain(where: str, message: ChatMessage, called: dict[str, str]) -> Message:
    """`called`: names of the functions called so far by the ids of the calls."""
    if message.role == "function":
        raise unsupported(f"{where}.role", "deprecated by OpenAI; use tool")
    for name, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
        if getattr(message, name) and message.role != role:
            raise bad_request(f"{where}.{name} is for the role {role} only", param=f"{where}.{name}")
    for name in ("function_call", "audio"):
        if getattr(message, name):
            raise unsupported(f"{where}.{name}", "deprecated by OpenAI, or not text")
    made = Message(role=message.role, content=_text(where, message))
    if message.tool_calls:
        made["tool_calls"] = message.tool_calls  # type: ignore[typeddict-item]  # checked when rendered
        called.update(_names(message.tool_calls))
    if message.role == "tool":
        if not message.tool_call_id:
            raise bad_request(f"{where}.tool_call_id is missing", param=f"{where}.tool_call_id")
        made["tool_call_id"] = message.tool_call_id
        if message.tool_call_id in called:  # some templates show it
            made["name"] = called[message.tool_call_id]
    return made


def _names(calls: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    names = {}
    for call in calls:
        function = call.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(call.get("id"), str) and isinstance(name, str):
            names[call["id"]] = name
    return names


def _text(where: str, message: ChatMessage) -> str:
    content = message.content
    if content is None:
        if message.tool_calls:
            return ""
        raise bad_request(f"{where}.content is missing", param=f"{where}.content")
    if isinstance(content, str):
        return content
    texts = []
    for number, part in enumerate(content):
        if isinstance(part, OtherPart):
            raise unsupported(f"{where}.content[{number}]", f"{part.type} is no text")
        texts.append(part.text)
    return "\n".join(texts)
