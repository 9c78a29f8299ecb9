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


def root_key(weights_digest: str, adapter_digest: str | None, salt: str) -> bytes:
    """What the chain of a sequence starts from: SHA-256(tag, weights_digest, adapter_digest, salt).

    `weights_digest` identifies the weights and their format, `adapter_digest` an adapter's content (None: no
    adapter, which differs from an empty digest).
    """
    fields = _field(weights_digest) + _field(adapter_digest) + _field(salt)
    return hashlib.sha256(_ROOT_TAG + fields).digest()


def extend_keys(keys: list[bytes], root: bytes, token_ids: Sequence[int]) -> None:
    """Append to `keys` what it lacks: a 32-byte key for each full page of `token_ids`, none for the tail.

    keys[-1] = root; keys[i] = SHA-256(keys[i - 1], ids of page i as little-endian uint32).
    """
    key = keys[-1] if keys else root
    for page in range(len(keys), len(token_ids) // KV_PAGE_TOKENS):
        start = page * KV_PAGE_TOKENS
        key = hashlib.sha256(key + _PAGE.pack(*token_ids[start : start + KV_PAGE_TOKENS])).digest()
        keys.append(key)


def _field(value: str | None) -> bytes:
    if value is None:
        return b"\0"
    # A salt comes from users: a lone surrogate must give a key, not an exception.
    encoded = value.encode("utf-8", errors="surrogatepass")
    return b"\1" + struct.pack("<Q", len(encoded)) + encoded
