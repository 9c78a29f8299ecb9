"""The ASGI application: the gate every request passes, the routes, and errors in their one shape.

The gate looks at the raw path and headers alone, before anything is parsed: host, key, shutdown, queue. A route
that is not in `ROUTES` does not exist, and one that is needs a key unless `octavo.server.access` opens it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, Router

from octavo.server import admin, model_routes
from octavo.server.access import OPEN_PATHS, Keys, check_host
from octavo.server.chat import chat
from octavo.server.chat_page import PAGE_FILES, chat_page
from octavo.server.completions import completions
from octavo.server.exchange import Exchange, Receive, Scope, Send
from octavo.server.faults import HttpFault, bad_request, fault_from, unavailable
from octavo.server.openapi import openapi
from octavo.server.responses import responses
from octavo.server.service import Service
from octavo.server.stall import ClientGone

Handler = Callable[[Service, Exchange], Awaitable[None]]

_log = logging.getLogger("octavo.server")


@dataclass(frozen=True, slots=True)
class RouteSpec:
    method: str
    path: str
    handler: Handler
    generates: bool = False
    """Takes a place in the queue."""


ROUTES: Sequence[RouteSpec] = (
    RouteSpec("POST", "/v1/chat/completions", chat, generates=True),
    RouteSpec("POST", "/v1/completions", completions, generates=True),
    RouteSpec("POST", "/v1/responses", responses, generates=True),
    RouteSpec("GET", "/v1/models", model_routes.list_models),
    RouteSpec("GET", "/v1/models/{name:path}", model_routes.show_model),
    RouteSpec("POST", "/tokenize", model_routes.tokenize),
    RouteSpec("POST", "/detokenize", model_routes.detokenize),
    RouteSpec("GET", "/health", model_routes.health),
    RouteSpec("GET", "/ready", model_routes.ready),
    RouteSpec("GET", "/metrics", model_routes.metrics),
    RouteSpec("GET", "/openapi.json", openapi),
    RouteSpec("POST", "/admin/models/load", admin.load),
    RouteSpec("POST", "/admin/models/unload", admin.unload),
    *(RouteSpec("GET", path, chat_page) for path in PAGE_FILES),
)
_OPEN_PATHS = OPEN_PATHS | frozenset(PAGE_FILES)
"""Answered without a key."""


class App:
    """ASGI. `keys` empty: nobody needs one. `admin_keys` empty: there is no /admin."""

    def __init__(self, service: Service, keys: Keys, admin_keys: Keys) -> None:
        self.service = service
        self._keys = keys
        self._admin_keys = admin_keys
        self.open = 0
        """Requests that are being answered, of routes that generate."""
        self._router = Router(
            [Route(spec.path, self._endpoint(spec), methods=[spec.method]) for spec in ROUTES],
            redirect_slashes=False,
        )
        routed: Callable[[Scope, Receive, Send], Awaitable[None]] = self._gated
        if service.settings.cors_origin:
            routed = CORSMiddleware(
                self._gated,
                allow_origins=list(service.settings.cors_origin),
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type", "x-request-id"],
                expose_headers=["x-request-id", "x-octavo-ignored", "retry-after"],
            )
        self._routed = routed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._routed(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})

    async def _gated(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, self.service.settings)
        scope["octavo.exchange"] = exchange
        started = time.perf_counter()
        path, route = scope["path"], "none"
        try:
            self._check(scope, exchange, path)
            # For Starlette: it then raises for a path or method that does not exist, instead of answering itself.
            scope["app"] = self
            await self._router(scope, receive, send)
            route = scope["octavo.route"]
        except ClientGone:
            exchange.facts["gone"] = True
            route = scope.get("octavo.route", route)
        except HTTPException as error:
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_value")
            what = (
                "there is no such path" if error.status_code == 404 else "this path does not take this method"
            )
            fault = HttpFault(error.status_code, what, code)
            await self._send_fault(exchange, fault, error.headers)
        except Exception as error:
            route = scope.get("octavo.route", route)
            fault = fault_from(error, exchange.id, exchange.names)
            if self.service.draining and fault.code == "engine_restarting":
                fault = unavailable("the server is shutting down", "shutting_down", 10)
            exchange.facts["code"] = fault.code
            if fault.status >= 500 and fault.code == "internal_error":
                _log.error(
                    "request %s: %s",
                    exchange.id,
                    type(error).__name__,
                    exc_info=_log.isEnabledFor(logging.DEBUG),
                )
            await self._send_fault(exchange, fault)
        self._note(exchange, route, time.perf_counter() - started)

    def _check(self, scope: Scope, exchange: Exchange, path: str) -> None:
        settings = self.service.settings
        if exchange.header("transfer-encoding") and exchange.header("content-length"):
            # h11 would go by the chunks; whoever stands in front may have gone by the length.
            raise bad_request("a body has a length or chunks, not both", code="invalid_http")
        check_host(exchange.header("host"), settings.host, settings.allow_host, has_keys=bool(self._keys))
        of_admin = path == "/admin" or path.startswith("/admin/")
        if of_admin and not self._admin_keys:
            raise HttpFault(
                403, "there is no /admin without --admin-key-file", "admin_disabled", "permission_error"
            )
        keys = self._admin_keys if of_admin else self._keys
        if keys and path not in _OPEN_PATHS:
            key = keys.find(exchange.header("authorization"))
            if key is None:
                raise HttpFault(
                    401, "a valid API key is needed: Authorization: Bearer KEY", "invalid_api_key"
                )
            scope["octavo.key"] = key
        if self.service.draining and path not in _OPEN_PATHS and path != "/metrics":
            raise unavailable("the server is shutting down", "shutting_down", 10)

    def _endpoint(self, spec: RouteSpec) -> _Endpoint:
        return _Endpoint(self, spec)

    async def _send_fault(self, exchange: Exchange, fault: HttpFault, headers: object = None) -> None:
        if isinstance(headers, dict):
            for name, value in headers.items():
                exchange.add_header(name.lower(), value)
        try:
            await exchange.send_fault(fault)
        except ClientGone:
            exchange.facts["gone"] = True

    def _note(self, exchange: Exchange, route: str, seconds: float) -> None:
        metrics, facts = self.service.metrics, exchange.facts
        status = "gone" if "gone" in facts else str(exchange.status)
        metrics.requests.labels(route, status).inc()
        for kind in ("prompt_tokens", "completion_tokens"):
            metrics.tokens.labels(kind.removesuffix("_tokens")).inc(facts.get(kind, 0))
        if route not in ("none", "/health", "/ready", "/metrics"):
            metrics.duration.labels(route).observe(seconds)
            about = " ".join(
                f"{k}={v}" for k, v in facts.items() if isinstance(v, (int, float, str)) and k != "gone"
            )
            key = f" key={exchange.key_id}" if exchange.key_id else ""
            _log.info("%s %s %s %.3fs %s%s", exchange.id, route, status, seconds, about, key)


class _Endpoint:
    """A route as Starlette takes it; a class, since it takes a function for something else."""

    def __init__(self, app: App, spec: RouteSpec) -> None:
        self._app = app
        self._spec = spec

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["octavo.route"] = self._spec.path
        exchange: Exchange = scope["octavo.exchange"]
        if not self._spec.generates:
            await self._spec.handler(self._app.service, exchange)
            return
        self._app.service.queue.check()
        self._app.open += 1
        try:
            await self._spec.handler(self._app.service, exchange)
        except asyncio.CancelledError:
            # The server's end, not the client's: a stream still gets its last word.
            await exchange.send_fault(unavailable("the server is shutting down", "shutting_down", 10))
            raise
        finally:
            self._app.open -= 1
