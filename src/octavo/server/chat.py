"""POST /v1/chat/completions: from a conversation to a message, whole or as server-sent events."""

from __future__ import annotations

import time
from typing import Any

from octavo.errors import InvalidGrammarError
from octavo.server.exchange import Exchange, around, dumps_text
from octavo.server.models import Resident
from octavo.server.prepare import Prepared, prepare_chat
from octavo.server.running import Piece, Running, collect
from octavo.server.schema import ChatRequest
from octavo.server.service import Service, fingerprint, usage_of
from octavo.server.tokens_json import TokenNames, chat_logprobs
from octavo.server.tools import grammar_fault
from octavo.text.answer import AnswerDelta, AnswerParser, Said, new_call_id
from octavo.types import FinishReason

_PLACE = "\0"
"""Where an event's text goes: not in anything that stands around it."""


async def chat(service: Service, exchange: Exchange) -> None:
    request, body = await service.read(exchange, ChatRequest)
    exchange.names = {"prompt_token_ids": "messages"}
    if request.max_completion_tokens is not None:
        exchange.names = {**exchange.names, "max_new_tokens": "max_completion_tokens"}

    async def work() -> None:
        async with service.running(exchange, request.model, body, request, prepare_chat) as (
            model,
            prepared,
            running,
        ):
            about = _About(exchange, model, prepared, request)
            answer = _stream if request.stream else _whole
            try:
                await answer(exchange, about, running)
            except InvalidGrammarError as error:
                raise grammar_fault(error, of_tools=bool(prepared.form.tools)) from None

    await exchange.answer(work())


class _About:
    """What all chunks of one answer share."""

    def __init__(self, exchange: Exchange, model: Resident, prepared: Prepared, request: ChatRequest) -> None:
        self.id = f"chatcmpl-{exchange.id}"
        self.created = int(time.time())
        self.model = model
        self.prepared = prepared
        self.request = request
        self.names = TokenNames(model.frontend.tokenizer)

    def base(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model.served.name,
            "system_fingerprint": fingerprint(self.model),
        }

    def logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self.request.logprobs:
            return None
        return {"content": chat_logprobs(self.names, piece.logprobs), "refusal": None}


async def _whole(exchange: Exchange, about: _About, running: Running) -> None:
    pieces = await collect(running, len(about.prepared.requests))
    choices = []
    for piece in pieces:
        parser = about.prepared.form.parser()
        said = Said()
        said.take([*parser.push(piece.text), *parser.finish()])
        choices.append(
            {
                "index": piece.index,
                "message": message_json(said),
                "logprobs": about.logprobs(piece),
                "finish_reason": finish_reason(piece, parser),
                "seed": about.prepared.requests[piece.index].sampling.seed,
            }
        )
    answer = {**about.base("chat.completion"), "choices": choices, "usage": usage_of(about.prepared, pieces)}
    if notices := [notice for piece in pieces[:1] if piece.completion for notice in piece.completion.notices]:
        answer["notices"] = notices
    exchange.facts.update(answer["usage"])
    await exchange.send_json(200, answer)


async def _stream(exchange: Exchange, about: _About, running: Running) -> None:
    options = about.request.stream_options
    with_usage = options is not None and options.include_usage
    base = about.base("chat.completion.chunk")
    if with_usage:
        base["usage"] = None
    parsers = [about.prepared.form.parser() for _ in about.prepared.requests]
    begun: set[int] = set()
    done: list[Piece] = []

    def event(index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return {**base, "choices": [choice]}

    def add(index: int, delta: dict[str, Any], **more: Any) -> None:
        exchange.add_event(event(index, delta, **more))

    around_text = [around(event(index, {"content": _PLACE}), _PLACE) for index in range(len(parsers))]

    async for pieces in running:
        for piece in pieces:
            index, parser = piece.index, parsers[piece.index]
            if index not in begun:
                begun.add(index)
                add(index, {"role": "assistant", "content": "", "refusal": None})
            deltas = parser.push(piece.text)
            if piece.completion is not None:
                deltas += parser.finish()
            logprobs = about.logprobs(piece)
            for delta in deltas or ([AnswerDelta()] if piece.logprobs else []):
                if delta.content and logprobs is None:
                    before, after = around_text[index]
                    exchange.add_raw_event(b"data: " + before + dumps_text(delta.content) + after)
                else:
                    add(index, delta_json(delta), logprobs=logprobs)
                logprobs = None  # with the first of this piece's deltas, once
            if piece.completion is not None:
                seed = about.prepared.requests[index].sampling.seed
                add(index, {}, finish_reason=finish_reason(piece, parser), seed=seed)
                done.append(piece)
        if len(done) < len(parsers):  # the last ones go out with the end
            await exchange.send_events()
    usage = usage_of(about.prepared, done)
    exchange.facts.update(usage)
    if with_usage:
        exchange.add_event({**base, "choices": [], "usage": usage})
    await exchange.end_events(b"data: [DONE]\n\n")


def message_json(said: Said) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": said.content if said.content or not said.calls else None,
        "refusal": None,
    }
    if said.reasoning:
        message["reasoning_content"] = said.reasoning
    if said.calls:
        message["tool_calls"] = list(said.tool_calls())
    return message


def delta_json(delta: AnswerDelta) -> dict[str, Any]:
    if (call := delta.tool_call) is not None:
        named = {} if call.name is None else {"id": new_call_id(), "type": "function"}
        function = {} if call.name is None else {"name": call.name}
        return {
            "tool_calls": [
                {"index": call.index, **named, "function": {**function, "arguments": call.arguments}}
            ]
        }
    if delta.reasoning:
        return {"reasoning_content": delta.reasoning}
    return {"content": delta.content}


def finish_reason(piece: Piece, parser: AnswerParser) -> str:
    """A call that was cut short is not one to make: then the reason is what cut it."""
    assert piece.completion is not None
    reason = piece.completion.finish_reason
    return "tool_calls" if parser.called and reason is FinishReason.STOP else str(reason)
