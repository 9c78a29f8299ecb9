"""Keys of the prefix cache: equal keys mean equal keys and values in a page, whoever asks.

A SHA-256 chain, one link a full page: the root holds everything but the tokens that decides what a page
contains (weights and format, adapter) or who may share it (salt), each field length-prefixed so that no two
choices encode alike. Which pages are kept, and for whom, is the page pool's and the scheduler's business.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from octavo.models.spec import KV_PAGE_TOKENS

_ROOT_TAG = b"octavo prefix 1\0"
_PAGE = struct.Struct(f"<{KV_PAGE_TOKENS}I")


def prefix_keys(
    weights_digest: str, adapter_digest: str | None, salt: str, token_ids: Sequence[int]
) -> list[bytes]:
    """A 32-byte key for each full page of `token_ids`; the tail that fills no page has none.

    key[-1] = SHA-256(tag, weights_digest, adapter_digest, salt); key[i] = SHA-256(key[i - 1], ids of page i as
    little-endian uint32). `weights_digest` identifies the weights and their format, `adapter_digest` an
    adapter's content (None: no adapter, which differs from an empty digest).
    """
    root = _ROOT_TAG + _field(weights_digest) + _field(adapter_digest) + _field(salt)
    key = hashlib.sha256(root).digest()
    keys = []
    for start in range(0, len(token_ids) - KV_PAGE_TOKENS + 1, KV_PAGE_TOKENS):
        page = _PAGE.pack(*token_ids[start : start + KV_PAGE_TOKENS])
        key = hashlib.sha256(key + page).digest()
        keys.append(key)
    return keys


def _field(value: str | None) -> bytes:
    if value is None:
        return b"\0"
    # A salt comes from users: a lone surrogate must give a key, not an exception.
    encoded = value.encode("utf-8", errors="surrogatepass")
    return b"\1" + struct.pack("<Q", len(encoded)) + encoded
