"""HTTP/1.1 as uvicorn and h11 have it, with three things more: a time for the headers, a cap on connections, and
errors in our shape (431 where the headers are too large) instead of plain text."""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from octavo.server.faults import HttpFault
from octavo.server.settings import ServerSettings

SEND_BUFFER_BYTES = 128 << 10
"""What the system holds for a client that does not read; it would take megabytes."""


def protocol_class(settings: ServerSettings) -> type[asyncio.Protocol]:
    """uvicorn makes one of these for each connection, and gives it nothing of ours: hence a class of its own."""

    class BoundedProtocol(_BoundedProtocol):
        header_seconds = settings.header_seconds
        max_connections = settings.max_connections

    return BoundedProtocol


class _BoundedProtocol(H11Protocol):
    header_seconds: float
    max_connections: int

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._waiting: asyncio.TimerHandle | None = None
        connection = transport.get_extra_info("socket")
        if connection is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        if len(self.connections) > self.max_connections:
            self._end_with(HttpFault(503, "too many connections", "too_many_connections", "server_error"))
            return
        self._waiting = self.loop.call_later(self.header_seconds, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._waiting is None:  # the start of the next request on this connection
            self._waiting = self.loop.call_later(self.header_seconds, self._too_slow)

    def send_400_response(self, msg: str) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            self._end_with(HttpFault(431, "the headers are too large", "headers_too_large"))
        else:
            self._end_with(HttpFault(400, "this is no valid HTTP request", "invalid_http"))

    def _too_slow(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._end_with(
                HttpFault(
                    408,
                    f"the headers did not come within {self.header_seconds:g} s",
                    "header_timeout",
                    retry=False,
                )
            )

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _end_with(self, fault: HttpFault) -> None:
        """A whole answer by hand: h11 is in no state to write one where it could not read."""
        if self.transport.is_closing():
            return
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.close()  # in the middle of an answer there is nothing to say that would be understood
            return
        body = json.dumps(fault.body()).encode()
        fields = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "x-request-id": secrets.token_hex(12),
            "connection": "close",
            **fault.headers(),
        }
        reason = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}
        head = f"HTTP/1.1 {fault.status} {reason.get(fault.status, 'Service Unavailable')}\r\n"
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.transport.write(head.encode("latin-1") + lines.encode("latin-1") + b"\r\n" + body)
        self.transport.close()
