"""What may be plugged into the step loop: grammars that constrain tokens, and drafters that guess them.

Protocols only; the engine calls them on its thread (compiling: on a thread beside it). One that raises fails
the request it was called for, and no other. Logits processors are a field of the request (octavo.types).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from octavo.types import Grammar

if TYPE_CHECKING:
    import numpy as np


class Constraint(Protocol):
    """A grammar on its way through one sequence's generated tokens."""

    @property
    def finished(self) -> bool:
        """The text is complete and nothing may follow: the request ends with STOP, whatever its stop ids are."""

    def mask(self) -> np.ndarray | None:
        """uint32 [ceil(V / 32)], bit i % 32 of word i // 32 set where token i may come next; None: all may.

        A function of the tokens accepted so far: it may be asked again for the same position."""

    def accept(self, token_id: int) -> None:
        """The token that was sampled. A stop id of the request is not passed on."""


CompileGrammar = Callable[[Grammar], Constraint]
"""Builds a constraint for one sequence; runs on a thread of its own while the sequence waits unadmitted."""


class Guess(NamedTuple):
    token_id: int
    chance: float
    """How likely it is, 0 to 1, where all guesses before it are right."""


Drafter = Callable[[Sequence[int]], Sequence[Guess]]
"""(prompt and generated token ids) -> guesses at the tokens that follow, the next one first; none: no guess.
Serves one sequence, whose list only grows from one call to the next; must not keep or change it."""

MakeDrafter = Callable[[], Drafter]


def error_of_hook(error: BaseException) -> Exception:
    """What fails the request whose hook raised. A hook is others' code: SystemExit, or a panic of a library in Rust,
    must not end the engine's thread. Raises KeyboardInterrupt again, which is nobody's error."""
    if isinstance(error, KeyboardInterrupt):
        raise error
    if isinstance(error, Exception):
        return error
    made = RuntimeError(f"{type(error).__name__}: {error}")
    made.__cause__ = error
    return made
