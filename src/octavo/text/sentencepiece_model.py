"""tokenizer.model, a SentencePiece model: the few fields of its protobuf that say how text becomes pieces.

Field numbers are those of sentencepiece_model.proto. The reader is bounded by the bytes that are there: every
length is checked before it is used, and an unknown field is skipped.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from octavo.errors import ModelFormatError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class PieceType(IntEnum):
    """Also GGUF's tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    algorithm: str
    """unigram, bpe, word or char."""
    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    byte_fallback: bool
    unk_id: int
    bos_id: int
    """-1: none, here and below."""
    eos_id: int
    precompiled_charsmap: bytes
    """The normalization of characters; b"": none."""
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    whitespace_as_suffix: bool


def parse_sentencepiece(data: bytes) -> SentencePieceModel:
    """Raises ModelFormatError for bytes that are no such model."""
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, int] = {}
    charsmap = b""
    normalizer: dict[int, int] = {}
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                piece = dict(_fields(value))
                pieces.append(_bytes(piece.get(1, b"")).decode())
                scores.append(struct.unpack("<f", _bytes(piece.get(2, bytes(4))))[0])
                types.append(_integer(piece.get(3, PieceType.NORMAL)))
            elif number == 2 and isinstance(value, bytes):
                trainer = {n: v for n, v in _fields(value) if isinstance(v, int)}
            elif number == 3 and isinstance(value, bytes):
                fields = dict(_fields(value))
                charsmap = _bytes(fields.get(2, b""))
                normalizer = {n: v for n, v in fields.items() if isinstance(v, int)}
    except (ValueError, struct.error) as error:
        raise _damaged(str(error)) from error
    if not pieces:
        raise _damaged("it has no pieces")
    names = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
    return SentencePieceModel(
        algorithm=names.get(trainer.get(3, 1), "unknown"),
        pieces=tuple(pieces),
        scores=tuple(scores),
        types=tuple(types),
        byte_fallback=bool(trainer.get(35, 0)),
        unk_id=_signed(trainer.get(40, 0)),
        bos_id=_signed(trainer.get(41, 1)),
        eos_id=_signed(trainer.get(42, 2)),
        precompiled_charsmap=charsmap,
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        whitespace_as_suffix=bool(trainer.get(24, 0)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value): integers for varints, bytes for everything else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"a field of type {kind} at byte {at}")
        if size > len(data) - at:
            raise ValueError(f"a field of {size} bytes at byte {at}, where {len(data) - at} are left")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it ends within a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number of more than 10 bytes at byte {at}")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where bytes belong")
    return value


def _integer(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes where a number belongs")
    return value


def _damaged(reason: str) -> ModelFormatError:
    return ModelFormatError(
        f"tokenizer.model is no SentencePiece model: {reason}", remedy="Fetch the model again."
    )
