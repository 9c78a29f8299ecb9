"""A block of reasoning that may have only so many tokens: its end is then written for the model.

A constraint of the engine (`octavo.engine.hooks`), around a grammar's or alone. It reads bytes, since a vocabulary need
not have the markers as tokens. Shape letter: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from octavo.text.answer import REASONING_BEGIN, REASONING_END

if TYPE_CHECKING:
    import numpy as np

_BEGIN, _END = REASONING_BEGIN.encode(), REASONING_END.encode()
_LONGEST_CHARACTER_BYTES = 4


class Inner(Protocol):
    """What holds for the answer anyway."""

    @property
    def finished(self) -> bool: ...

    def mask(self) -> np.ndarray | None: ...

    def accept(self, token_id: int) -> None: ...


class ReasoningBudget:
    """One text's. Not thread-safe.

    `opened`: the prompt has begun the block; else the text may, with its first characters. `closing` is what is
    written once the block has `tokens` tokens. `spell` gives a token's bytes, markers spelled out.
    """

    def __init__(
        self,
        inner: Inner | None,
        *,
        tokens: int,
        opened: bool,
        closing: Sequence[int],
        spell: Callable[[int], bytes],
        vocab_size: int,
    ) -> None:
        self._inner = inner
        self._left = tokens
        self._state: Literal["before", "inside", "closing", "after"] = "inside" if opened else "before"
        self._closing = list(closing)
        self._spell = spell
        self._vocab_size = vocab_size
        self._tail = b""
        """The end of the block so far, as far as a marker or a character may be begun in it."""
        self._close_if_due()

    @property
    def finished(self) -> bool:
        return self._inner is not None and self._inner.finished

    def mask(self) -> np.ndarray | None:
        """uint32 [ceil(V / 32)]; None: all may come next."""
        if self._state != "closing":
            return None if self._inner is None else self._inner.mask()
        import numpy as np

        mask = np.zeros((self._vocab_size + 31) // 32, np.uint32)
        mask[self._closing[0] // 32] = np.uint32(1 << self._closing[0] % 32)
        return mask

    def accept(self, token_id: int) -> None:
        """Raises what the inner constraint raises."""
        if self._inner is not None:
            self._inner.accept(token_id)
        match self._state:
            case "closing":
                self._closing.pop(0)
                if not self._closing:
                    self._state = "after"
            case "before":
                self._tail += self._spell(token_id)
                self._begin()
            case "inside":
                self._left -= 1
                self._tail = (self._tail + self._spell(token_id))[-len(_END) - 64 :]
                self._close_if_due()
            case "after":
                pass

    def _begin(self) -> None:
        begun = self._tail.lstrip()
        if begun.startswith(_BEGIN):
            self._state, self._tail = "inside", begun.removeprefix(_BEGIN)
            self._close_if_due()
        elif not _BEGIN.startswith(begun):
            self._state = "after"

    def _close_if_due(self) -> None:
        if self._state != "inside":
            return
        if _END in self._tail:
            self._state = "after"
        elif self._left <= 0 and _ends_with_a_character(self._tail):
            self._state = "closing"


def _ends_with_a_character(text: bytes) -> bool:
    """Whether no character is begun and not complete: a marker in its middle would spoil it."""
    for back in range(1, min(_LONGEST_CHARACTER_BYTES, len(text)) + 1):
        byte = text[-back]
        if byte & 0xC0 != 0x80:  # not a continuation
            needed = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return needed <= back
    return True
