"""/openapi.json: made from the request models and the routes, so that it cannot say anything else than they do."""

from __future__ import annotations

import functools
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from octavo.server import schema
from octavo.server.exchange import Exchange
from octavo.server.service import Service
from octavo.version import __version__

_BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": schema.ChatRequest,
    "/v1/completions": schema.CompletionRequest,
    "/v1/responses": schema.ResponsesRequest,
    "/tokenize": schema.TokenizeRequest,
    "/detokenize": schema.DetokenizeRequest,
    "/admin/models/load": schema.AdminRequest,
    "/admin/models/unload": schema.AdminRequest,
}


async def openapi(service: Service, exchange: Exchange) -> None:
    await exchange.send_json(200, document())


@functools.cache
def document() -> dict[str, Any]:
    from octavo.server.app import ROUTES

    _, definitions = models_json_schema(
        [(model, "validation") for model in _BODIES.values()], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, Any] = {}
    for spec in ROUTES:
        path = spec.path.replace(":path", "")
        paths.setdefault(path, {})[spec.method.lower()] = _operation(path, spec.generates)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Octavo", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {**definitions.get("$defs", {}), "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(path: str, generates: bool) -> dict[str, Any]:
    body = _BODIES.get(path)
    kind = "text/plain" if path == "/metrics" else "application/json"
    content: dict[str, Any] = {
        kind: {"schema": {"type": "string"} if path == "/metrics" else _ANSWERS.get(path, {"type": "object"})}
    }
    if generates:
        # No schema: some readers would check the stream against it, others each event.
        content["text/event-stream"] = {}
    found: dict[str, Any] = {
        "responses": {"200": {"description": "The answer.", "content": content}, "default": _FAULT}
    }
    if path == "/ready":
        found["responses"]["503"] = {"description": "Not ready.", "content": content}
    if "{name}" in path:
        found["parameters"] = [
            {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ]
    if body is not None:
        found["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}},
        }
    if path not in ("/health", "/ready"):
        found["security"] = [{"key": []}, {}]
    return found


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


_TEXT, _NUMBER = {"type": "string"}, {"type": "integer"}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_ERROR = _object(
    error=_object(message=_TEXT, type=_TEXT, param=_TEXT_OR_NULL, code=_TEXT),
)
_FAULT = {
    "description": "An error.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}
_USAGE = _object(
    prompt_tokens=_NUMBER,
    completion_tokens=_NUMBER,
    total_tokens=_NUMBER,
    prompt_tokens_details=_object(cached_tokens=_NUMBER),
)
_FINISH = {"enum": ["stop", "length", "tool_calls", "content_filter"]}
_CARD = _object(id=_TEXT, object={"const": "model"}, created=_NUMBER, owned_by=_TEXT)


def _answer(kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    return _object(
        id=_TEXT,
        object={"const": kind},
        created=_NUMBER,
        model=_TEXT,
        system_fingerprint=_TEXT,
        choices={"type": "array", "minItems": 1, "items": choice},
        usage=_USAGE,
    )


_ANSWERS: dict[str, Any] = {
    "/v1/chat/completions": _answer(
        "chat.completion",
        _object(
            index=_NUMBER,
            finish_reason=_FINISH,
            logprobs={"type": ["object", "null"]},
            message=_object(role={"const": "assistant"}, content=_TEXT_OR_NULL),
        ),
    ),
    "/v1/completions": _answer(
        "text_completion",
        _object(index=_NUMBER, finish_reason=_FINISH, text=_TEXT, logprobs={"type": ["object", "null"]}),
    ),
    "/v1/responses": _object(
        id=_TEXT,
        object={"const": "response"},
        status={"enum": ["completed", "incomplete"]},
        model=_TEXT,
        output={"type": "array", "items": {"type": "object"}},
        usage={"type": "object"},
    ),
    "/v1/models": _object(object={"const": "list"}, data={"type": "array", "items": _CARD}),
    "/v1/models/{name}": _CARD,
    "/tokenize": _object(
        model=_TEXT, tokens={"type": "array", "items": _NUMBER}, count=_NUMBER, max_model_len=_NUMBER
    ),
    "/detokenize": _object(model=_TEXT, prompt=_TEXT),
    "/admin/models/load": _object(model=_TEXT, state=_TEXT),
    "/admin/models/unload": _object(model=_TEXT, state=_TEXT),
    "/health": _object(status={"const": "ok"}),
    "/ready": _object(state=_TEXT, models={"type": "object"}),
}
