"""POST /v1/responses: the stateless part of OpenAI's newer API, over the same chat as /v1/chat/completions.

Input is text or items, the answer one message item; what would need a store or a tool of the server is refused by
name. Streams are named events, numbered in order.
"""

from __future__ import annotations

import time
from typing import Any

from octavo.server.exchange import Exchange
from octavo.server.faults import bad_request, unsupported
from octavo.server.models import Resident
from octavo.server.prepare import Prepared, prepare_chat
from octavo.server.running import Piece, Running, collect
from octavo.server.schema import ChatMessage, ChatRequest, InputItem, ResponsesRequest, read
from octavo.server.service import Service, usage_of
from octavo.text.answer import AnswerParser

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


async def responses(service: Service, exchange: Exchange) -> None:
    values, body = await exchange.json()
    request, without_effect = read(ResponsesRequest, values)
    service.note_ignored(exchange, without_effect)
    chat = as_chat(request)

    async def work() -> None:
        async with service.running(exchange, request.model, body, chat, prepare_chat) as (
            model,
            prepared,
            running,
        ):
            answer = _Answer(exchange, model, prepared, request)
            if request.stream:
                await _stream(exchange, answer, running)
            else:
                (piece,) = await collect(running, 1)
                parser = prepared.parser()
                answer.take(parser, piece)
                exchange.facts.update(usage_of(prepared, [piece]))
                await exchange.send_json(200, answer.whole(piece))

    await exchange.answer(work())


def as_chat(request: ResponsesRequest) -> ChatRequest:
    """The same request to /v1/chat/completions. Raises HttpFault for what has no counterpart there."""
    messages: list[ChatMessage] = []
    if request.instructions is not None:
        messages.append(ChatMessage(role="system", content=request.instructions))
    if isinstance(request.input, str):
        messages.append(ChatMessage(role="user", content=request.input))
    else:
        messages += [_message(place, item) for place, item in enumerate(request.input)]
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
        tools=request.tools,
        tool_choice=request.tool_choice,
        response_format=None if text_format is None else text_format.as_chat(),
    )


def _message(place: int, item: InputItem) -> ChatMessage:
    where = f"input[{place}]"
    if item.type not in (None, "message"):
        raise unsupported(f"{where}.type", f"items of type {item.type[:40]} are not served")
    for name in item.model_extra or ():
        param = f"{where}.{name[:80]}"
        raise bad_request(
            f"{param} is not a known field. Leave it out.", code="unsupported_parameter", param=param
        )
    if item.role is None or item.content is None:
        raise bad_request(f"{where} needs role and content", param=where)
    return ChatMessage(role=item.role, content=item.content)


class _Answer:
    """The response object as it grows."""

    def __init__(
        self, exchange: Exchange, model: Resident, prepared: Prepared, request: ResponsesRequest
    ) -> None:
        self.id = f"resp_{exchange.id}"
        self.item_id = f"msg_{exchange.id}"
        self.text = ""
        self.prepared = prepared
        self._request = request
        self._model = model.served.name
        self._created = int(time.time())

    def take(self, parser: AnswerParser, piece: Piece) -> str:
        """Add a piece's text; what of it is content."""
        deltas = parser.push(piece.text)
        if piece.completion is not None:
            deltas += parser.finish()
        delta = "".join(each.content for each in deltas)
        self.text += delta
        return delta

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
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text"}}
            if request.text is None
            else request.text.model_dump(by_alias=True, exclude_none=True),
            "tool_choice": "auto",
            "tools": [],
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            **more,
        }

    def part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
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
            output=[self.item(status, [self.part(self.text)])],
            usage={
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        )


async def _stream(exchange: Exchange, answer: _Answer, running: Running) -> None:
    number = 0

    async def event(kind: str, **fields: Any) -> None:
        nonlocal number
        await exchange.send_event({"type": kind, "sequence_number": number, **fields}, kind)
        number += 1

    place = {"item_id": answer.item_id, "output_index": 0, "content_index": 0}
    parser = answer.prepared.parser()
    async for pieces in running:
        for piece in pieces:
            if exchange.status is None:
                await exchange.start_events()
                await event("response.created", response=answer.object("in_progress"))
                await event("response.in_progress", response=answer.object("in_progress"))
                await event("response.output_item.added", output_index=0, item=answer.item("in_progress", []))
                await event("response.content_part.added", **place, part=answer.part(""))
            delta = answer.take(parser, piece)
            if delta:
                await event("response.output_text.delta", **place, delta=delta, logprobs=[])
            if piece.completion is not None:
                whole = answer.whole(piece)
                exchange.facts.update(usage_of(answer.prepared, [piece]))
                await event("response.output_text.done", **place, text=answer.text, logprobs=[])
                await event("response.content_part.done", **place, part=answer.part(answer.text))
                await event("response.output_item.done", output_index=0, item=whole["output"][0])
                await event(f"response.{whole['status']}", response=whole)
    await exchange.end_events()
