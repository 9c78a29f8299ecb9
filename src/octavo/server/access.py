"""Who may ask: API keys, host names, and which paths are open. Default deny, decided on the raw path.

Keys are compared as SHA-256 digests in constant time, all of them each time. Web pages of other origins cannot
reach a server on this machine: their Host is not one of ours, and no origin is allowed unless configured.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

from octavo.errors import UsageError
from octavo.server.faults import HttpFault
from octavo.server.settings import is_loopback

OPEN_PATHS = frozenset({"/health", "/ready"})
"""Answered without a key."""
_SHORTEST_KEY = 8
_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::\d{1,5})?")


class Keys:
    """API keys as digests; the keys themselves are not kept."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def find(self, authorization: str | None) -> str | None:
        """An id of the key in an Authorization header, fit for logs; None where there is no such key."""
        scheme, _, key = (authorization or "").partition(" ")
        given = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(digest, given)
        # A digest of the digest: the id in a log tells nothing that could be tried against the key.
        return hashlib.sha256(given).hexdigest()[:16] if found and scheme.lower() == "bearer" else None


NO_KEYS = Keys(())


def read_keys(file: Path | None, variable: str | None) -> Keys:
    """Keys from a file, one a line (# starts a comment), and from an environment variable's value.

    Raises UsageError where the file cannot be read, others may read it, or a key is too short to be one.
    """
    keys = [variable] if variable else []
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
            open_to_others = file.stat().st_mode & 0o077
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"cannot read the key file {file}: {error}", remedy="Correct its path."
            ) from error
        if open_to_others:
            raise UsageError(f"others may read the key file {file}", remedy=f"Run: chmod 600 {file}")
        keys += [key for line in lines if (key := line.partition("#")[0].strip())]
        if not keys:
            raise UsageError(f"the key file {file} holds no key", remedy="Write one key a line into it.")
    if any(len(key) < _SHORTEST_KEY or not key.isascii() or " " in key for key in keys):
        raise UsageError(
            f"an API key is shorter than {_SHORTEST_KEY} characters, or holds spaces or other than ASCII",
            remedy="Make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
        )
    return Keys(keys)


def check_host(header: str | None, bound: str, allowed: Iterable[str], *, has_keys: bool) -> None:
    """Raises HttpFault 400 for what is no host, 403 for one that is not ours.

    With keys any well-formed name will do unless some are allowed by name: a page of another origin has no key.
    """
    match = _HOST.fullmatch(header or "")
    if match is None:
        raise HttpFault(400, "the Host header is missing or malformed", "invalid_host")
    name = match["name"].lower()
    allowed = {each.lower() for each in allowed}
    if name in allowed or (has_keys and not allowed):
        return
    if is_loopback(name) or name == bound.lower().strip("[]"):
        return
    raise HttpFault(
        403, "this host name is not allowed; --allow-host adds one", "host_not_allowed", "permission_error"
    )
