"""POST /v1/responses: the stateless part of OpenAI's newer API, over the same chat as /v1/chat/completions.

Input is text or items, the answer items too (`octavo.server.response_items`); what would need a store or a tool of
the server is refused by name. Streams are named events, numbered in order.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from octavo.errors import InvalidGrammarError
from octavo.server.exchange import Exchange
from octavo.server.faults import HttpFault, bad_request, unsupported
from octavo.server.models import Resident
from octavo.server.prepare import Prepared, prepare_chat
from octavo.server.response_items import Event, Items
from octavo.server.running import Piece, Running, collect
from octavo.server.schema import ChatMessage, ChatRequest, InputItem, ResponsesRequest
from octavo.server.service import Service, usage_of
from octavo.server.tools import grammar_fault
from octavo.types import FinishReason

_SAME_NAME = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stream",
    "cache_salt",
    "user",
)

_RENAMED = {"reasoning_effort": "reasoning.effort", "response_format": "text.format"}
"""Fields of chat completions -> their names here."""


async def responses(service: Service, exchange: Exchange) -> None:
    request, body = await service.read(exchange, ResponsesRequest)
    if isinstance(request.input, list) and any(item.type == "reasoning" for item in request.input):
        service.note_ignored(exchange, ("input.reasoning",))  # as reasoning_content of chat completions
    exchange.names = {
        "prompt_token_ids": "input",
        "max_new_tokens": "max_output_tokens",
        "json_schema": "text.format",
        "response_format": "text.format",
    }
    chat = as_chat(request)

    async def work() -> None:
        async with service.running(exchange, request.model, body, chat, prepare_chat) as (
            model,
            prepared,
            running,
        ):
            answer = _Answer(exchange, model, prepared, request)
            try:
                if request.stream:
                    await _stream(exchange, answer, running)
                else:
                    (piece,) = await collect(running, 1)
                    answer.take(piece)
                    exchange.facts.update(usage_of(prepared, [piece]))
                    await exchange.send_json(200, answer.whole(piece))
            except InvalidGrammarError as error:
                raise grammar_fault(error, of_tools=bool(prepared.form.tools)) from None

    try:
        await exchange.answer(work())
    except HttpFault as fault:
        fault.param = _RENAMED.get(fault.param or "", fault.param)
        raise


def as_chat(request: ResponsesRequest) -> ChatRequest:
    """The same request to /v1/chat/completions. Raises HttpFault for what has no counterpart there."""
    messages: list[ChatMessage] = []
    if request.instructions is not None:
        messages.append(ChatMessage(role="system", content=request.instructions))
    if isinstance(request.input, str):
        messages.append(ChatMessage(role="user", content=request.input))
    else:
        for place, item in enumerate(request.input):
            _add_message(messages, f"input[{place}]", item)
    if request.store:
        raise unsupported("store", "nothing is kept between requests")
    if request.background:
        raise unsupported("background", "answers are given on the same connection")
    if request.truncation not in (None, "disabled"):
        raise unsupported("truncation", 'prompts are never cut; only "disabled" is')
    text_format = None if request.text is None else request.text.format
    values: dict[str, Any] = {name: getattr(request, name) for name in _SAME_NAME}
    return ChatRequest(
        **values,
        messages=messages,
        max_tokens=request.max_output_tokens,
        tools=None if request.tools is None else [_tool(n, tool) for n, tool in enumerate(request.tools)],
        tool_choice=_tool_choice(request.tool_choice),
        parallel_tool_calls=request.parallel_tool_calls,
        reasoning=request.reasoning,
        response_format=None if text_format is None else text_format.as_chat(),
    )


def _add_message(messages: list[ChatMessage], where: str, item: InputItem) -> None:
    """An input item as a message, or as a part of the one before."""
    for name in item.model_extra or () if item.type != "reasoning" else ():
        param = f"{where}.{name[:80]}"
        raise bad_request(
            f"{param} is not a known field. Leave it out.", code="unsupported_parameter", param=param
        )
    if item.type in (None, "message") and item.name is not None:
        raise unsupported(f"{where}.name", "templates know roles only")
    match item.type:
        case None | "message":
            if item.role is None or item.content is None:
                raise bad_request(f"{where} needs role and content", param=where)
            messages.append(ChatMessage(role=item.role, content=item.content))
        case "function_call":
            call = {
                "id": item.call_id,
                "type": "function",
                "function": {"name": item.name, "arguments": item.arguments},
            }
            if item.call_id is None or item.name is None or item.arguments is None:
                raise bad_request(f"{where} needs call_id, name and arguments", param=where)
            last = messages[-1] if messages else None
            if last is None or last.role != "assistant":
                messages.append(ChatMessage(role="assistant", tool_calls=[call]))
            else:  # one turn, as the template knows it
                last.tool_calls = [*(last.tool_calls or []), call]
        case "function_call_output":
            if item.call_id is None or item.output is None:
                raise bad_request(f"{where} needs call_id and output", param=where)
            messages.append(ChatMessage(role="tool", tool_call_id=item.call_id, content=item.output))
        case "reasoning":
            pass
        case _:
            raise unsupported(f"{where}.type", f"items of type {item.type[:40]} are not served")


def _tool(place: int, tool: Mapping[str, Any]) -> dict[str, Any]:
    """In the form of chat completions, where a function's parts are an object of their own."""
    if tool.get("type") != "function":
        raise unsupported(f"tools[{place}].type", "only function is: the server has no tools of its own")
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _tool_choice(choice: str | Mapping[str, Any] | None) -> str | dict[str, Any] | None:
    if not isinstance(choice, Mapping):
        return choice
    if set(choice) == {"type", "name"} and choice["type"] == "function":
        return {"type": "function", "function": {"name": choice["name"]}}
    raise unsupported(
        "tool_choice", 'only "none", "auto", "required" and {"type": "function", "name": ...} are'
    )


class _Answer:
    """The response object as it grows."""

    def __init__(
        self, exchange: Exchange, model: Resident, prepared: Prepared, request: ResponsesRequest
    ) -> None:
        self.id = f"resp_{exchange.id}"
        self.items = Items()
        self.prepared = prepared
        self._request = request
        self._model = model.served.name
        self._created = int(time.time())
        self._parser = prepared.form.parser()

    def take(self, piece: Piece) -> list[Event]:
        """Add a piece's text; the events that tell it."""
        events = self.items.take(self._parser.push(piece.text))
        if piece.completion is not None:
            events += self.items.take(self._parser.finish())
            events += self.items.finish(complete=piece.completion.finish_reason is FinishReason.STOP)
        return events

    def object(self, status: str, **more: Any) -> dict[str, Any]:
        request = self._request
        sampling = self.prepared.requests[0].sampling
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self._model,
            "output": [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {
                "effort": None if request.reasoning is None else request.reasoning.effort,
                "summary": None,
            },
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text"}}
            if request.text is None
            else request.text.model_dump(by_alias=True, exclude_none=True),
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            **more,
        }

    def whole(self, piece: Piece) -> dict[str, Any]:
        assert piece.completion is not None
        status, details = "completed", None
        if piece.completion.finish_reason == "length":
            status, details = "incomplete", {"reason": "max_output_tokens"}
        elif piece.completion.finish_reason == "content_filter":
            status, details = "incomplete", {"reason": "content_filter"}
        usage = usage_of(self.prepared, [piece])
        return self.object(
            status,
            incomplete_details=details,
            output=[item.json() for item in self.items.items],
            usage={
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": usage.get("completion_tokens_details", {"reasoning_tokens": 0}),
                "total_tokens": usage["total_tokens"],
            },
        )


async def _stream(exchange: Exchange, answer: _Answer, running: Running) -> None:
    number = 0

    def add(kind: str, **fields: Any) -> None:
        nonlocal number
        exchange.add_event({"type": kind, "sequence_number": number, **fields}, kind)
        number += 1

    async for pieces in running:
        for piece in pieces:
            if exchange.status is None:
                add("response.created", response=answer.object("in_progress"))
                add("response.in_progress", response=answer.object("in_progress"))
            for kind, fields in answer.take(piece):
                add(f"response.{kind}", **fields)
            if piece.completion is not None:
                whole = answer.whole(piece)
                exchange.facts.update(usage_of(answer.prepared, [piece]))
                add(f"response.{whole['status']}", response=whole)
        await exchange.send_events()
    await exchange.end_events()
