"""The reference runner: plain torch on any device, the oracle of all others."""

from octavo.runners.reference.kind import ReferenceKind

__all__ = ["ReferenceKind"]
