"""One HTTP request and its answer, over ASGI: a bounded body in, JSON or server-sent events out.

Says nothing about what is asked or answered. A client that sends or takes too slowly is cut off here; one that
goes away ends what was being done for it (`answer`), streamed or not.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from octavo.server import strict_json
from octavo.server.faults import HttpFault, bad_request
from octavo.server.settings import ServerSettings
from octavo.server.stall import ClientGone, StallWatch

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

BIG_BODY_BYTES = 64 << 10
"""Bodies above this are parsed beside the loop."""
MAX_BODY_CHUNKS = 65_536
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Exchange:
    """For one request. `id` is ours; a client's own x-request-id is only echoed, never used for anything."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, settings: ServerSettings) -> None:
        self.scope = scope
        self._receive = receive
        self._send = send
        self._stall = StallWatch(settings.stall_seconds)
        self._settings = settings
        self.id = secrets.token_hex(12)
        self.status: int | None = None
        """Of the answer, once it has begun."""
        self.facts: dict[str, Any] = {}
        """Ids, counts and timings for the log."""
        self.names: Mapping[str, str] = {}
        """How this request calls our parameters, for errors: those of `octavo.settings`, and `prompt_token_ids`."""
        self._headers: dict[str, str] = {"x-request-id": self._echoed_id()}
        self._events: list[bytes] = []
        """Of a stream, that go out together."""
        self._body_read = False

    def header(self, name: str) -> str | None:
        """The value of a header that stands there once, or the first of several."""
        wanted = name.encode("ascii")
        return next((v.decode("latin-1") for k, v in self.scope["headers"] if k == wanted), None)

    def add_header(self, name: str, value: str) -> None:
        """A second value of a name is one more of its list."""
        before = self._headers.get(name)
        self._headers[name] = value if before is None else f"{before}, {value}"

    @property
    def key_id(self) -> str:
        """Which API key: the start of its digest; "" without keys. Separates prefix reuse, and is fit for logs."""
        found: str = self.scope.get("octavo.key", "")
        return found

    def _echoed_id(self) -> str:
        given = self.header("x-request-id")
        return given if given is not None and _REQUEST_ID.fullmatch(given) else self.id

    # --- in ------------------------------------------------------------------------------------------------

    async def body(self) -> bytes:
        """The whole body. Raises HttpFault 413, 415 and 408, ClientGone."""
        kind = (self.header("content-type") or "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HttpFault(415, "the body must be application/json", "unsupported_media_type")
        if (self.header("content-encoding") or "identity").lower() != "identity":
            raise HttpFault(415, "the body must not be compressed", "unsupported_media_type")
        length = self.header("content-length")
        if length is not None and length.isdigit() and int(length) > self._settings.max_body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                body = await self._read()
        except TimeoutError:
            raise HttpFault(
                408,
                f"the body did not come within {self._settings.body_seconds:g} s",
                "body_timeout",
                retry=False,
            ) from None
        self._body_read = True
        return body

    async def _read(self) -> bytes:
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk = message.get("body", b"")
            size += len(chunk)
            chunks.append(chunk)
            if size > self._settings.max_body_bytes:
                raise self._too_large()
            if len(chunks) > MAX_BODY_CHUNKS:
                raise bad_request(f"the body came in more than {MAX_BODY_CHUNKS} pieces", code="invalid_json")
            if not message.get("more_body"):
                return b"".join(chunks)

    def _too_large(self) -> HttpFault:
        return HttpFault(
            413,
            f"the body is larger than {self._settings.max_body_bytes} bytes",
            "body_too_large",
            retry=False,
        )

    async def json(self) -> tuple[dict[str, Any], bytes]:
        """The body's object, and its bytes. Raises what `body` and `octavo.server.strict_json.parse` raise."""
        body = await self.body()
        if len(body) > BIG_BODY_BYTES:
            return await asyncio.to_thread(strict_json.parse, body), body
        return strict_json.parse(body), body

    async def answer(self, work: Awaitable[None]) -> None:
        """Do `work`, and cancel it if the client goes away first. Raises ClientGone."""
        doing = asyncio.ensure_future(work)
        watching = asyncio.ensure_future(self._until_gone())
        try:
            await asyncio.wait((doing, watching), return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                doing.cancel()
                await asyncio.wait((doing,))
                if doing.cancelled():
                    raise ClientGone
            doing.result()
        finally:
            for task in (doing, watching):
                task.cancel()
            await asyncio.gather(doing, watching, return_exceptions=True)

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    # --- out -----------------------------------------------------------------------------------------------

    async def send_json(
        self, status: int, value: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> None:
        await self.send_bytes(status, dumps(value), "application/json", headers)

    async def send_bytes(
        self, status: int, body: bytes, kind: str, headers: Mapping[str, str] | None = None
    ) -> None:
        more = {**(headers or {}), "content-length": str(len(body))}
        await self._start(status, kind, more)
        await self._put(
            {"type": "http.response.body", "body": b"" if self.scope["method"] == "HEAD" else body}
        )

    async def send_fault(self, fault: HttpFault) -> None:
        """As the whole answer, or as the last event of a stream that has begun."""
        if self.status is None:
            # What is left of a body that was refused cannot be told from the next request.
            close = {} if self._body_read or self.scope["method"] == "GET" else {"connection": "close"}
            await self.send_json(fault.status, fault.body(), {**fault.headers(), **close})
        else:
            self.add_event(fault.body())
            await self.end_events()

    def add_event(self, value: Mapping[str, Any], name: str | None = None) -> None:
        """One more event for the next `send_events`."""
        head = b"" if name is None else b"event: " + name.encode("ascii") + b"\n"
        self.add_raw_event(head + b"data: " + dumps(value))

    def add_raw_event(self, event: bytes) -> None:
        self._events += (event, b"\n\n")

    async def send_events(self) -> None:
        """What was added since the last time, in one message: each costs more than most events do."""
        if self._events:
            await self._send_added(b"", more=True)

    async def end_events(self, last: bytes = b"") -> None:
        await self._send_added(last, more=False)

    async def _send_added(self, last: bytes, *, more: bool) -> None:
        if self.status is None:
            await self._start(
                200,
                "text/event-stream; charset=utf-8",
                {"cache-control": "no-store", "x-accel-buffering": "no"},
            )
        body = b"".join((*self._events, last))
        self._events.clear()
        await self._put({"type": "http.response.body", "body": body, "more_body": more})

    async def _start(self, status: int, kind: str, headers: Mapping[str, str]) -> None:
        self.status = status
        found = {"content-type": kind, "x-content-type-options": "nosniff", **self._headers, **headers}
        await self._put(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(k.encode("latin-1"), v.encode("latin-1", "replace")) for k, v in found.items()],
            }
        )

    async def _put(self, message: MutableMapping[str, Any]) -> None:
        """Send, waiting while the client's buffer is full, but not for ever."""
        await self._stall.send(self._send(message))


def around(value: Mapping[str, Any], place: str) -> tuple[bytes, bytes]:
    """The JSON of `value` before and after the one text in it that is `place`: what many events share."""
    before, _, after = dumps(value).partition(dumps_text(place))
    return before, after


def dumps_text(text: str) -> bytes:
    return _JSON.encode(text).encode()


_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def dumps(value: Mapping[str, Any]) -> bytes:
    return _JSON.encode(value).encode()
