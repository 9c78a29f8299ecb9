"""Names of files as a message lists them."""

from __future__ import annotations

from collections.abc import Collection


def listed(names: Collection[str], most: int = 8) -> str:
    """Names for a message: without control characters, and not more of them than a person reads."""
    shown = [name[:80] if name.isprintable() else repr(name)[:80] for name in list(names)[:most]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
