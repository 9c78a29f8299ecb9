"""Token spellings -> bytes, against the tokenizers library's own decoders."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders

from octavo.errors import UnsupportedConfigError
from octavo.text.pieces import byte_alphabet, compile_decoder

SENTENCEPIECE = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def section(decoder: Any) -> dict[str, Any]:
    described: dict[str, Any] = json.loads(decoder.__getstate__())
    return described


def decoded(decoder: Any, pieces: list[str]) -> str:
    rules = compile_decoder(section(decoder))
    parts = [rules.to_bytes(piece, first=i == 0, added=False) for i, piece in enumerate(pieces)]
    text = b"".join(parts).decode(errors="replace")
    spaces = len(text) - len(text.lstrip(" "))
    return text[min(spaces, rules.leading_spaces) :]


def test_alphabet_is_gpt2s() -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert {character: byte for byte, character in bytes_to_unicode().items()} == byte_alphabet()


@given(st.lists(st.text(st.sampled_from(sorted(byte_alphabet())), max_size=6), max_size=8))
def test_byte_level(pieces: list[str]) -> None:
    assert decoded(decoders.ByteLevel(), pieces) == decoders.ByteLevel().decode(pieces)


@given(st.lists(st.text(st.sampled_from("▁ aé中😀<>0x"), max_size=5), max_size=8))
def test_sentencepiece(pieces: list[str]) -> None:
    assert decoded(SENTENCEPIECE, pieces) == SENTENCEPIECE.decode(pieces)


@given(st.lists(st.text("▁ a中", max_size=5), max_size=8), st.sampled_from(["always", "never", "first"]))
def test_metaspace(pieces: list[str], scheme: str) -> None:
    decoder = decoders.Metaspace(prepend_scheme=scheme)
    assert decoded(decoder, pieces) == decoder.decode(pieces)


@given(st.text(max_size=4))
def test_bytes_to_fall_back_to(text: str) -> None:
    pieces = [f"<0x{byte:02X}>" for byte in text.encode()]
    assert decoded(SENTENCEPIECE, pieces) == SENTENCEPIECE.decode(pieces)


def test_an_invalid_byte_costs_only_itself() -> None:
    """The library replaces every byte of the run; here the valid character before it stays."""
    pieces = [f"<0x{byte:02X}>" for byte in "é".encode()] + ["<0xFF>", "a"]
    assert decoded(SENTENCEPIECE, pieces) == "é\ufffda"
    assert SENTENCEPIECE.decode(pieces) == "\ufffd\ufffd\ufffda"


def test_added_tokens_are_plain_text() -> None:
    """ "õ" is a letter of the byte alphabet too; as an added token it is itself."""
    rules = compile_decoder({"type": "ByteLevel"})
    assert rules.to_bytes("õ", first=False, added=True) == "õ".encode()
    assert rules.to_bytes("õ", first=False, added=False) == b"\xf5"
    assert rules.to_bytes("<｜end▁of｜>", first=False, added=False) == "<｜end▁of｜>".encode()


@pytest.mark.parametrize(
    "unsupported",
    [
        None,
        section(decoders.BPEDecoder()),
        section(decoders.CTC()),
        section(decoders.WordPiece()),
        section(decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])),
        section(decoders.Sequence([decoders.Fuse(), decoders.Replace("a", "b")])),
        section(decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)])),
        {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"},
    ],
)
def test_what_looks_ahead_is_refused_by_name(unsupported: dict[str, Any] | None) -> None:
    with pytest.raises(UnsupportedConfigError) as caught:
        compile_decoder(unsupported)
    assert caught.value.key == "decoder"
