"""What is here and how it is: /v1/models, /tokenize, /detokenize, /health, /ready, /metrics."""

from __future__ import annotations

import asyncio
from typing import Any

from octavo.server.exchange import Exchange
from octavo.server.faults import bad_request
from octavo.server.logs import without_paths
from octavo.server.messages import plain_messages
from octavo.server.models import ServedModel
from octavo.server.schema import DetokenizeRequest, TokenizeRequest, read
from octavo.server.service import Service
from octavo.server.settings import visible_limits
from octavo.validate import DEFAULT_LIMITS, validate_text


async def health(service: Service, exchange: Exchange) -> None:
    """The process is alive: nothing is asked of any model."""
    await exchange.send_json(200, {"status": "ok"})


async def ready(service: Service, exchange: Exchange) -> None:
    state = "draining" if service.draining else "ready" if service.models.is_ready() else "not ready"
    headers = {} if state == "ready" else {"retry-after": "2"}
    await exchange.send_json(
        200 if state == "ready" else 503, {"state": state, "models": service.models.status()}, headers
    )


async def list_models(service: Service, exchange: Exchange) -> None:
    data = [_card(service, service.models.find(name)) for name in service.models.names]
    await exchange.send_json(200, {"object": "list", "data": data})


async def show_model(service: Service, exchange: Exchange) -> None:
    served = service.models.find(exchange.scope["path_params"]["name"])
    await exchange.send_json(200, {**_card(service, served), **_details(service, served)})


def _card(service: Service, served: ServedModel) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": service.started, "owned_by": "octavo"}


def _details(service: Service, served: ServedModel) -> dict[str, Any]:
    limits = {
        **visible_limits(service.settings),
        "max_stop_strings": DEFAULT_LIMITS.stop_strings,
        "max_stop_characters": DEFAULT_LIMITS.stop_characters,
        "max_stop_token_ids": DEFAULT_LIMITS.stop_token_ids,
        "max_logit_bias": DEFAULT_LIMITS.logit_bias,
        "max_logprobs": DEFAULT_LIMITS.logprobs,
    }
    found: dict[str, Any] = {
        "aliases": list(served.aliases),
        "state": service.models.state(served.name),
        "limits": limits,
    }
    resident = service.models.resident(served.name)
    if resident is not None:
        known = resident.ready
        limits |= {"context_tokens": known.context_tokens, "max_sequences": known.max_sequences}
        facts = {k: v for k, v in known.facts.items() if k not in ("device_reason",)}
        found |= {
            "vocab_size": known.vocab_size,
            "memory_bytes": resident.link.needed_bytes,
            "has_chat_template": resident.frontend.template is not None,
            "facts": facts,
            "notices": [without_paths(notice) for notice in known.notices],
        }
    return found


async def tokenize(service: Service, exchange: Exchange) -> None:
    values, _ = await exchange.json()
    request, _ = read(TokenizeRequest, values)
    if (request.prompt is None) == (request.messages is None):
        raise bad_request("give either prompt or messages", param="prompt")
    exchange.names = {"prompt_token_ids": "prompt" if request.messages is None else "messages"}
    served = service.models.find(request.model)

    async def work() -> None:
        place = service.queue.enter(1, 0)
        try:
            async with service.models.use(served.name, service.settings.queue_seconds) as model:

                def ids() -> list[int]:
                    frontend = model.frontend
                    if request.messages is not None:
                        messages = plain_messages(request.messages, service.settings)
                        return list(frontend.render(messages).token_ids)
                    tokenizer = frontend.require_tokenizer()
                    if request.prompt == "":
                        return []
                    text = validate_text(request.prompt)
                    if request.add_special_tokens is False:
                        return tokenizer.encode(text, parse_special=False)
                    return tokenizer.encode_prompt(text, parse_special=False)

                tokens = await service.in_thread(ids)
                await exchange.send_json(
                    200,
                    {
                        "model": served.name,
                        "tokens": tokens,
                        "count": len(tokens),
                        "max_model_len": model.ready.context_tokens,
                    },
                )
        finally:
            place.leave()

    await exchange.answer(work())


async def detokenize(service: Service, exchange: Exchange) -> None:
    values, _ = await exchange.json()
    request, _ = read(DetokenizeRequest, values)
    exchange.names = {"prompt_token_ids": "tokens"}
    served = service.models.find(request.model)

    async def work() -> None:
        place = service.queue.enter(1, 0)
        try:
            async with service.models.use(served.name, service.settings.queue_seconds) as model:
                tokenizer = model.frontend.require_tokenizer()
                text = await service.in_thread(lambda: tokenizer.decode(request.tokens, continuation=True))
                await exchange.send_json(200, {"model": served.name, "prompt": text})
        finally:
            place.leave()

    await exchange.answer(work())


async def metrics(service: Service, exchange: Exchange) -> None:
    shown = service.metrics
    shown.waiting.set(service.queue.waiting)
    shown.waiting_tokens.set(service.queue.waiting_tokens)
    shown.refused.set(service.queue.refused)
    shown.restarts.set(service.models.restarts)
    shown.evictions.set(service.models.evictions)
    loaded = {name: service.models.resident(name) for name in service.models.names}
    links = {name: resident.link for name, resident in loaded.items() if resident is not None}
    facts = await asyncio.gather(*(link.facts() for link in links.values()))
    page = shown.page(dict(zip(links, facts, strict=True)))
    await exchange.send_bytes(200, page, "text/plain; version=0.0.4; charset=utf-8")
