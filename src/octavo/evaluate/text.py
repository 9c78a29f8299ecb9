"""The text a model is judged on, and its cut into segments.

The bundled one is Lewis Carroll's "Alice's Adventures in Wonderland" (1865), which is in the public domain: the
file alice29.txt of the Canterbury corpus (Millennium Fulcrum Edition 2.9), line ends made LF. Models have read it
in training, so perplexities on it flatter; differences between formats are what it is for.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Self

from octavo.errors import EmptyPromptError, NotTextError, UsageError
from octavo.text.tokenizer import Tokenizer

_LEAST_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Text:
    name: str
    content: str

    @classmethod
    def bundled(cls) -> Self:
        file = resources.files("octavo.evaluate") / "texts" / "alice.txt"
        return cls("Alice's Adventures in Wonderland (bundled)", file.read_text(encoding="utf-8"))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises UsageError where the file cannot be read, NotTextError where it is not UTF-8."""
        try:
            return cls(str(path), path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(
                f"cannot read {path}: {error.strerror}", remedy="Give --text a file of plain text."
            ) from error
        except UnicodeDecodeError as error:
            raise NotTextError(
                f"{path} is not UTF-8 text (byte {error.start})", remedy="Convert it to UTF-8 first."
            ) from error


@dataclass(frozen=True, slots=True)
class Segments:
    ids: tuple[tuple[int, ...], ...]
    """Each begins with the model's BOS where it wants one, and is scored from its second token on."""
    text_tokens: int
    """Of the text, at most those asked for: the first token of a segment without BOS is not scored."""

    @property
    def scored_tokens(self) -> int:
        return sum(len(segment) - 1 for segment in self.ids)

    @classmethod
    def of(cls, text: Text, tokenizer: Tokenizer, *, tokens: int, segment_tokens: int) -> Self:
        """The first `tokens` tokens, without overlap. Raises EmptyPromptError where the text has fewer than two."""
        # Tokens of text are four characters long or so; a book need not be cut to its end.
        ids = tokenizer.encode(text.content[: 16 * tokens], parse_special=False)[:tokens]
        if len(ids) < _LEAST_TOKENS:
            raise EmptyPromptError(
                f"{text.name} has {'one token' if ids else 'no tokens'}, and nothing can be scored",
                remedy="Give --text a longer text.",
            )
        start = (tokenizer.bos_token_id,) if tokenizer.adds_bos and tokenizer.bos_token_id is not None else ()
        step = segment_tokens - len(start)
        cut = [start + tuple(ids[i : i + step]) for i in range(0, len(ids), step)]
        return cls(tuple(segment for segment in cut if len(segment) >= _LEAST_TOKENS), len(ids))
