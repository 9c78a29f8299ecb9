"""POST /v1/completions: raw continuations, one or many, whole or as server-sent events; echo scores the prompt."""

from __future__ import annotations

import time
from typing import Any

from octavo.server.exchange import Exchange
from octavo.server.models import Resident
from octavo.server.prepare import Prepared, prepare_completion
from octavo.server.running import Piece, Running, collect
from octavo.server.schema import CompletionRequest
from octavo.server.service import Service, fingerprint, usage_of
from octavo.server.tokens_json import TokenNames, completion_logprobs
from octavo.types import TokenLogprob


async def completions(service: Service, exchange: Exchange) -> None:
    request, body = await service.read(exchange, CompletionRequest)
    exchange.names = {"prompt_token_ids": "prompt"}

    async def work() -> None:
        async with service.running(exchange, request.model, body, request, prepare_completion) as (
            model,
            prepared,
            running,
        ):
            text = _Text(exchange, model, prepared, request)
            if request.stream:
                await _stream(exchange, text, running)
            else:
                await _whole(exchange, text, running)

    await exchange.answer(work())


class _Text:
    """Makes choices of pieces; knows how far each choice's text has come."""

    def __init__(
        self, exchange: Exchange, model: Resident, prepared: Prepared, request: CompletionRequest
    ) -> None:
        self.prepared = prepared
        self.request = request
        self._names = TokenNames(model.frontend.tokenizer)
        self._offsets: dict[int, int] = {}
        self.base = {
            "id": f"cmpl-{exchange.id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.served.name,
            "system_fingerprint": fingerprint(model),
        }

    def choice(self, piece: Piece) -> dict[str, Any]:
        first = piece.index not in self._offsets
        text, entries = piece.text, [*piece.logprobs]
        ids = self.prepared.requests[piece.index].prompt_token_ids
        logprobs: list[TokenLogprob | None] = list(entries)
        if first:
            self._offsets[piece.index] = 0
            if self.request.echo:
                text = self.prepared.prompt_texts[piece.index // self.prepared.n] + text
                if piece.prompt_logprobs is not None:
                    logprobs = [None, *piece.prompt_logprobs, *entries]
        found: dict[str, Any] = {"text": text, "index": piece.index, "logprobs": None, "finish_reason": None}
        if self.request.logprobs is not None:
            found["logprobs"], self._offsets[piece.index] = completion_logprobs(
                self._names, logprobs, ids, self._offsets[piece.index]
            )
        if piece.completion is not None:
            found["finish_reason"] = str(piece.completion.finish_reason)
            found["seed"] = self.prepared.requests[piece.index].sampling.seed
        return found


async def _whole(exchange: Exchange, text: _Text, running: Running) -> None:
    pieces = await collect(running, len(text.prepared.requests))
    usage = usage_of(text.prepared, pieces)
    exchange.facts.update(usage)
    await exchange.send_json(200, {**text.base, "choices": [text.choice(p) for p in pieces], "usage": usage})


async def _stream(exchange: Exchange, text: _Text, running: Running) -> None:
    options = text.request.stream_options
    with_usage = options is not None and options.include_usage
    base = {**text.base, "usage": None} if with_usage else text.base
    done: list[Piece] = []
    async for pieces in running:
        for piece in pieces:
            if not piece.is_empty:
                exchange.add_event({**base, "choices": [text.choice(piece)]})
            if piece.completion is not None:
                done.append(piece)
        if len(done) < len(text.prepared.requests):  # the last ones go out with the end
            await exchange.send_events()
    usage = usage_of(text.prepared, done)
    exchange.facts.update(usage)
    if with_usage:
        exchange.add_event({**base, "choices": [], "usage": usage})
    await exchange.end_events(b"data: [DONE]\n\n")
