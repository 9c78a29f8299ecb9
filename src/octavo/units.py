"""Counts of bytes in words."""

from __future__ import annotations


def readable_bytes(count: int) -> str:
    """1.5 GiB, 538 MiB, 12 KiB, 7 bytes."""
    if count >= 1 << 30:
        return f"{count / (1 << 30):.1f} GiB"
    if count >= 1 << 20:
        return f"{count / (1 << 20):.0f} MiB"
    return f"{count / (1 << 10):.0f} KiB" if count >= 1 << 10 else f"{count} bytes"
