"""The law: deltas joined are the decoding of all tokens, for every sequence."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.errors import InvalidInputError
from octavo.text.detokenizer import Detokenizer
from octavo.text.tokenizer import Tokenizer

TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(
            [
                "😀",
                "👩‍👩‍👧",
                "中文",
                "e\u0301",
                "ก็",
                " ",
                "  ",
                "\n\n",
                "\t",
                "\ufffd",
                "a",
                "The ",
                "<s>",
                "\x00",
                "İ",
                "\U0010ffff",
            ]
        )
    ).map("".join),
)


def streamed(tokenizer: Tokenizer, ids: Sequence[int], **flags: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, **flags)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


@given(data=st.data(), keep_special=st.booleans(), continuation=st.booleans())
def test_random_ids(
    any_tokenizer: Tokenizer, data: st.DataObject, keep_special: bool, continuation: bool
) -> None:
    ids = data.draw(st.lists(st.integers(0, any_tokenizer.vocab_size - 1), max_size=30))
    flags = {"keep_special": keep_special, "continuation": continuation}
    assert "".join(streamed(any_tokenizer, ids, **flags)) == any_tokenizer.decode(ids, **flags)


@given(text=TEXTS)
def test_texts_keep_every_character(any_tokenizer: Tokenizer, text: str) -> None:
    ids = any_tokenizer.encode(text, parse_special=False)
    deltas = streamed(any_tokenizer, ids)
    assert "".join(deltas) == any_tokenizer.decode(ids)
    if any_tokenizer.unknown_token_id not in ids:
        assert sum(delta.count("\ufffd") for delta in deltas) == text.count("\ufffd")


@given(text=TEXTS)
def test_byte_level_text_comes_back(byte_level: Tokenizer, text: str) -> None:
    assert byte_level.decode(byte_level.encode(text, parse_special=False)) == text


@given(text=TEXTS)
def test_only_the_start_of_a_character_is_held_back(byte_level: Tokenizer, text: str) -> None:
    """After each token, what was shown is all complete characters of the bytes so far."""
    ids = byte_level.encode(text, parse_special=False)
    detokenizer, shown, seen = Detokenizer(byte_level), "", b""
    for token_id in ids:
        shown += detokenizer.push(token_id)
        seen += byte_level.token_bytes(token_id, first=False) or b""
        assert shown == seen.decode(errors="ignore")


def test_the_dummy_space_goes_but_a_continuations_space_stays(sentencepiece_gguf: Tokenizer) -> None:
    ids = sentencepiece_gguf.encode("the word", parse_special=False)
    assert sentencepiece_gguf.decode(ids) == "the word"
    assert sentencepiece_gguf.decode(ids, continuation=True) == " the word"
    assert "".join(streamed(sentencepiece_gguf, ids, continuation=True)) == " the word"


def test_special_tokens_in_the_middle(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a<|im_end|>b<think>", parse_special=True)
    assert streamed(byte_level, ids) == ["a", "", "b", "<think>", ""]
    assert "".join(streamed(byte_level, ids, keep_special=True)) == "a<|im_end|>b<think>"


def test_half_a_character_at_the_end(byte_level: Tokenizer) -> None:
    first_byte = byte_level.encode("é", parse_special=False)[0]
    assert byte_level.token_bytes(first_byte, first=True) == b"\xc3"
    assert streamed(byte_level, [first_byte]) == ["", "\ufffd"]


@pytest.mark.parametrize("bad", [-1, 10**9, 2**70])
def test_ids_outside_the_vocabulary(byte_level: Tokenizer, bad: int) -> None:
    with pytest.raises(InvalidInputError, match="outside the vocabulary"):
        byte_level.decode([bad])
    with pytest.raises(InvalidInputError):
        Detokenizer(byte_level).push(bad)


@pytest.mark.parametrize("bad", [1.5, "1", None])
def test_what_is_no_id_is_refused(byte_level: Tokenizer, bad: object) -> None:
    with pytest.raises(InvalidInputError, match="whole number"):
        byte_level.decode([bad])  # type: ignore[list-item]


def test_cost_does_not_grow_with_length(byte_level: Tokenizer) -> None:
    """A full decode at each step would take 100 times as long for the last thousand as for the first."""
    ids = byte_level.encode("The quick brown fox é中 " * 20_000, parse_special=False)
    detokenizer = Detokenizer(byte_level)

    def seconds(part: Sequence[int]) -> float:
        started = time.process_time()
        for token_id in part:
            detokenizer.push(token_id)
        return time.process_time() - started

    chunk = len(ids) // 10
    times = [seconds(ids[start : start + chunk]) for start in range(0, 10 * chunk, chunk)]
    assert min(times[5:]) < 5 * max(times[:5])


@pytest.mark.model
def test_random_ids_of_the_default_model(default_tokenizer: Tokenizer) -> None:
    """10,000 sequences."""
    draw = random.Random(7)
    for _ in range(10_000):
        ids = [draw.randrange(default_tokenizer.vocab_size) for _ in range(draw.randrange(1, 9))]
        assert "".join(streamed(default_tokenizer, ids)) == default_tokenizer.decode(ids), ids
