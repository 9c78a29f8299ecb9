"""From a token's spelling in the vocabulary to the bytes of text it stands for.

Compiled once from the decoder section of a tokenizer.json (GGUF files get the same sections). A table of
bytes rather than the library's own decoder, because bytes concatenate: text can be streamed token by token
at constant cost, and an invalid byte never costs its neighbours. Decoders whose output for one token depends
on the tokens after it are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from octavo.errors import UnsupportedConfigError


@cache
def byte_alphabet() -> Mapping[str, int]:
    """GPT-2's byte alphabet: one visible character for each of the 256 bytes.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for U+0100 and up.
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in sorted(visible)} | {
        chr(256 + i): byte for i, byte in enumerate(hidden)
    }


@dataclass(frozen=True, slots=True)
class PieceDecoder:
    """How pieces become bytes. The bytes of a text are the concatenated bytes of its pieces."""

    byte_level: bool = False
    """Pieces are written in the byte alphabet."""
    byte_fallback: bool = False
    """A piece "<0xE4>" is that byte."""
    replacements: tuple[tuple[str, str], ...] = ()
    """(what, by what), in order: SentencePiece's U+2581 becomes a space."""
    first_drops: str = ""
    """A character that disappears from the first piece of a text (Metaspace's dummy prefix)."""
    leading_spaces: int = 0
    """Spaces removed from the start of a text, at most (SentencePiece's dummy prefix)."""

    def to_bytes(self, piece: str, *, first: bool, added: bool) -> bytes:
        """`first`: the piece starts a text. `added`: an added token, which is spelled as plain text."""
        if self.byte_level:
            if added:
                return piece.encode()
            alphabet = byte_alphabet()
            try:
                return bytes(alphabet[character] for character in piece)
            except KeyError:
                return piece.encode()
        if self.byte_fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            try:
                return bytes([int(piece[3:5], 16)])
            except ValueError:
                pass
        if first and self.first_drops:
            piece = piece.replace(self.first_drops, "")
        for what, by_what in self.replacements:
            piece = piece.replace(what, by_what)
        return piece.encode()


def compile_decoder(section: Mapping[str, Any] | None) -> PieceDecoder:
    """The rules of a tokenizer.json's "decoder" section.

    Raises UnsupportedConfigError for a decoder that cannot be applied piece by piece.
    """
    steps = [] if section is None else _flatten(section)
    decoder = PieceDecoder()
    fused = False
    for position, step in enumerate(steps):
        match step:
            case {"type": "ByteLevel"} if len(steps) == 1:
                decoder = PieceDecoder(byte_level=True)
            case {"type": "Metaspace", "replacement": str(mark)} if len(steps) == 1:
                keeps = step.get("prepend_scheme") == "never" or step.get("add_prefix_space") is False
                decoder = PieceDecoder(replacements=((mark, " "),), first_drops="" if keeps else mark)
            case {"type": "Replace", "pattern": {"String": str(what)}, "content": str(by_what)} if not (
                fused or decoder.byte_fallback
            ):
                decoder = replace(decoder, replacements=(*decoder.replacements, (what, by_what)))
            case {"type": "ByteFallback"} if not fused:
                decoder = replace(decoder, byte_fallback=True)
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if (
                fused and position == len(steps) - 1
            ):
                decoder = replace(decoder, leading_spaces=start)
            case _:
                raise _unsupported(step)
    if not steps:
        raise _unsupported({"type": None})
    return decoder


def _flatten(section: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    if section.get("type") == "Sequence":
        return [step for child in section["decoders"] for step in _flatten(child)]
    return [section]


def _unsupported(step: Mapping[str, Any]) -> UnsupportedConfigError:
    return UnsupportedConfigError(
        f"the tokenizer's decoder {step.get('type')!r} cannot be applied token by token",
        remedy="Use token ids instead of text, or a model with a byte-level or SentencePiece tokenizer.",
        key="decoder",
    )
