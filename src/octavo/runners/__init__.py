"""Runners, and which come first. Asking for the list imports no torch."""

from __future__ import annotations

from octavo.runners.base import RunnerKind
from octavo.runners.reference import ReferenceKind


def runner_kinds() -> tuple[RunnerKind, ...]:
    """All runners, fastest first; each says itself what it declines. The reference takes everything."""
    return (ReferenceKind(),)
