"""Token ids -> text, one token at a time.

The law: the pieces returned, joined, are `Tokenizer.decode` of all the ids, for every sequence and every way
to cut it. Held back is only what may still change: the first bytes of a UTF-8 character, and the start of the
text while a dummy space may have to go. Constant time and memory per token.
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.text.tokenizer import Tokenizer


class Detokenizer:
    """For one sequence, from one thread."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        keep_special: bool = False,
        continuation: bool = False,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        """The flags are those of `Tokenizer.decode`. `shown`: special tokens that are spelled out all the same."""
        self._tokenizer = tokenizer
        self._keep_special = keep_special
        self._shown = shown
        self._first = not continuation
        self._spaces_to_drop = 0 if continuation else tokenizer.leading_spaces
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token makes certain, often its own, sometimes "".

        Raises InvalidInputError for an id outside the vocabulary.
        """
        keep = self._keep_special or token_id in self._shown
        part = self._tokenizer.token_bytes(token_id, first=self._first, keep_special=keep)
        if part is None:
            return ""
        self._first = False
        return self._trimmed(self._utf8.decode(part))

    def finish(self) -> str:
        """The rest: U+FFFD for a character that was never completed, else ""."""
        return self._trimmed(self._utf8.decode(b"", final=True))

    def _trimmed(self, text: str) -> str:
        while self._spaces_to_drop and text:
            if text[0] != " ":
                self._spaces_to_drop = 0
                break
            text = text[1:]
            self._spaces_to_drop -= 1
        return text
