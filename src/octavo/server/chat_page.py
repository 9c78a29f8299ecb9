"""The chat page at / and its files. They hold nothing of the server's, so they are open; the API they call is not.

Files are named one by one: no path of a request ever reaches a file system.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from types import MappingProxyType

from octavo.server.exchange import Exchange
from octavo.server.service import Service

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "LICENSE": "text/plain; charset=utf-8",
}
_NAMES = (
    "style.css",
    "main.js",
    "api.js",
    "store.js",
    "view.js",
    "vendor/marked.js",
    "vendor/marked.LICENSE",
    "vendor/purify.js",
    "vendor/purify.LICENSE",
)
PAGE_FILES: Mapping[str, str] = MappingProxyType(
    {"/": "index.html"} | {f"/page/{name}": name for name in _NAMES}
)
"""Path -> file in `octavo/server/page`."""

_HEADERS = {
    "cache-control": "no-cache",
    # An answer cannot load, send or frame anything, whatever it makes of the page.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
}


async def chat_page(service: Service, exchange: Exchange) -> None:
    name = PAGE_FILES[exchange.scope["path"]]
    body = resources.files("octavo.server").joinpath("page", *name.split("/")).read_bytes()
    await exchange.send_bytes(200, body, _TYPES[name.rpartition(".")[2]], _HEADERS)
