"""GGUF metadata -> tokenizer, against sentencepiece itself and transformers' GGUF conversion."""

from __future__ import annotations

import re
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from octavo.errors import ModelFormatError, UnsupportedConfigError
from octavo.text.pieces import byte_alphabet
from octavo.text.pretokenizers import PRE_TOKENIZERS
from octavo.text.tokenizer import Tokenizer, load_tokenizer
from octavo.types import TokenizerSource

NORMAL, UNKNOWN, CONTROL, USER = 1, 2, 3, 4
TEXTS = st.one_of(st.text(), st.text(st.sampled_from("aB 1٣²'sré中😀\n\r\t.,<|▁-\u0301\u00a0"), max_size=60))
SAMPLES = [
    "Items:\n\n1. one\n2. two  \n\n\n   three\t\tfour",
    "I've we'LL they'D x'ſ 123456 ¾ ٣٤ mixedCase HTTPServer naïve",
    "e\u0301tat 中文，日本語! <tag attr='1'> $100 + 5% = ~x^y | `code`",
    "  leading and trailing  \r\n\r\nNBSP\u00a0here\u3000wide",
]


def byte_level_metadata(**changes: Any) -> dict[str, Any]:
    """Every byte, two merges, and one token of each other kind."""
    tokens = [*sorted(byte_alphabet()), "ab", "abc", "<|end|>", "<tool>", "<｜eos｜>"]
    kinds = [*[NORMAL] * 258, CONTROL, USER, CONTROL]
    entries = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": kinds,
        "merges": ["a b", "ab c"],
        "bos_token_id": 258,
        "eos_token_id": 260,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in entries.items() if value is not None}


def load(metadata: dict[str, Any]) -> Tokenizer:
    return load_tokenizer(TokenizerSource("gguf", metadata=metadata))


# --- byte-level -------------------------------------------------------------------------------------------


def cuts(pattern_list: tuple[str, ...]) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in pattern_list]
    )


def theirs() -> dict[str, str]:
    """transformers' own table, which its releases before 5.23 do not have."""
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    return dict(getattr(mapping, "GGUF_PRE_TOKENIZER_SPLITS", {}))


@pytest.mark.parametrize("name", sorted(set(theirs()) & set(PRE_TOKENIZERS)))
@settings(max_examples=25)
@given(text=TEXTS)
def test_cuts_are_those_of_transformers(name: str, text: str) -> None:
    ours, peer = cuts(PRE_TOKENIZERS[name].cuts), cuts((theirs()[name],))
    for sample in (text, *SAMPLES):
        assert ours.pre_tokenize_str(sample) == peer.pre_tokenize_str(sample)


@settings(max_examples=200)
@given(text=TEXTS)
def test_gpt2_and_digit_cuts_are_those_of_the_library(text: str) -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    references = {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
    }
    for name, reference in references.items():
        ours = pre_tokenizers.Sequence([cuts(PRE_TOKENIZERS[name].cuts), whole])
        assert ours.pre_tokenize_str(text) == reference.pre_tokenize_str(text)


def test_digits_are_cut_for_smollm_only() -> None:
    merges = {"tokens": [*sorted(byte_alphabet()), "12", "<e>"], "token_type": [*[NORMAL] * 257, CONTROL]}
    metadata = byte_level_metadata(**merges, merges=["1 2"], bos_token_id=None, eos_token_id=None)
    assert len(load(metadata).encode("12", parse_special=False)) == 1
    assert len(load(metadata | {"tokenizer.ggml.pre": "smollm"}).encode("12", parse_special=False)) == 2


def test_control_and_user_defined_tokens() -> None:
    tokenizer = load(byte_level_metadata())
    assert tokenizer.encode("abc<|end|><tool><｜eos｜>", parse_special=True) == [257, 258, 259, 260]
    assert tokenizer.special_token_ids == {258, 260}
    assert tokenizer.reserved_token_ids == {258, 259, 260}
    assert tokenizer.decode([257, 258, 259, 260]) == "abc<tool>"
    assert tokenizer.decode([260], keep_special=True) == "<｜eos｜>"
    assert tokenizer.named_tokens == {"bos_token": "<|end|>", "eos_token": "<｜eos｜>"}
    assert tokenizer.end_token_ids == {260}
    assert tokenizer.vocab_size == 261


def test_an_unmarked_end_of_turn_is_a_control_token() -> None:
    metadata = byte_level_metadata(token_type=[NORMAL] * 261)
    assert load(metadata).special_token_ids == {258}


@pytest.mark.parametrize(
    ("changes", "adds_bos"),
    [
        ({}, False),
        ({"add_bos_token": True}, True),
        ({"pre": "llama-bpe"}, True),
        ({"pre": "llama-bpe", "add_bos_token": False}, False),
        ({"add_bos_token": True, "bos_token_id": None}, False),
    ],
)
def test_bos_rules(changes: dict[str, Any], adds_bos: bool) -> None:
    assert load(byte_level_metadata(**changes)).adds_bos is adds_bos


def test_ends_of_turn_and_message_count_as_ends() -> None:
    metadata = byte_level_metadata(eot_token_id=258, eom_token_id=259, padding_token_id=4_000_000_000)
    assert load(metadata).end_token_ids == {258, 259, 260}


@pytest.mark.parametrize("name", ["kimi-k2", "something-new"])
def test_unknown_cuts_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedConfigError, match=name) as caught:
        load(byte_level_metadata(pre=name))
    assert caught.value.key == "tokenizer.ggml.pre"


@pytest.mark.parametrize("name", [None, "default"])
def test_cuts_without_a_name_are_announced(name: str | None) -> None:
    assert "pre-tokenizer" in load(byte_level_metadata(pre=name)).notices[0]
    assert load(byte_level_metadata()).notices == ()


@pytest.mark.parametrize("model", ["bert", "t5", "rwkv", None])
def test_other_models_are_refused_by_name(model: str | None) -> None:
    with pytest.raises(UnsupportedConfigError, match=re.escape(repr(model))):
        load(byte_level_metadata(model=model))


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": None},
        {"tokens": []},
        {"tokens": "abc"},
        {"tokens": [1, 2]},
        {"tokens": ["a", "a"], "token_type": [1, 1]},
        {"token_type": [1, 2]},
        {"merges": None},
        {"merges": ["ab"]},
        {"merges": ["a zz"]},
        {"merges": ["a c"]},
    ],
)
def test_damaged_metadata(changes: dict[str, Any]) -> None:
    with pytest.raises(ModelFormatError, match="damaged"):
        load(byte_level_metadata(**changes))


# --- SentencePiece ----------------------------------------------------------------------------------------


MORE_TEXTS = st.one_of(TEXTS, st.text(st.sampled_from("the <table>▁ s\n"), max_size=40))


@given(text=MORE_TEXTS)
@settings(max_examples=300)
def test_ids_are_those_of_sentencepiece(sentencepiece_gguf: Tokenizer, llama_like: Any, text: str) -> None:
    assert sentencepiece_gguf.encode(text, parse_special=False) == llama_like[0].encode(text)


@given(text=MORE_TEXTS)
@settings(max_examples=300)
def test_ids_are_those_of_sentencepiece_with_user_defined_pieces(
    gemma_gguf: Tokenizer, gemma_like: Any, text: str
) -> None:
    assert gemma_gguf.encode(text, parse_special=False) == gemma_like[0].encode(text)


def test_ids_of_real_text_are_those_of_sentencepiece(
    sentencepiece_gguf: Tokenizer, gemma_gguf: Tokenizer, llama_like: Any, gemma_like: Any, corpus: list[str]
) -> None:
    for tokenizer, (processor, _) in ((sentencepiece_gguf, llama_like), (gemma_gguf, gemma_like)):
        for text in corpus[20:40]:
            ids = tokenizer.encode(text, parse_special=False)
            assert ids == processor.encode(text)
            assert tokenizer.decode(ids) == text == processor.decode(ids)


def test_a_space_before_the_first_word(sentencepiece_gguf: Tokenizer, gemma_gguf: Tokenizer) -> None:
    assert sentencepiece_gguf.encode("the", parse_special=False) == [sentencepiece_gguf.token_id("▁the")]
    assert gemma_gguf.encode(" the", parse_special=False) == [gemma_gguf.token_id("▁the")]
    for tokenizer in (sentencepiece_gguf, gemma_gguf):
        assert tokenizer.decode(tokenizer.encode("the word", parse_special=False)) == "the word"


def test_sentencepiece_prompts_start_with_bos(sentencepiece_gguf: Tokenizer) -> None:
    assert sentencepiece_gguf.encode_prompt("the", parse_special=False)[0] == sentencepiece_gguf.bos_token_id


def test_a_space_follows_every_special_token(sentencepiece_gguf: Tokenizer) -> None:
    """llama.cpp's rule for this kind of vocabulary."""
    the = sentencepiece_gguf.token_id("▁the")
    end = sentencepiece_gguf.token_id("</s>")
    assert sentencepiece_gguf.encode("the</s>the", parse_special=True) == [the, end, the]


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer.ggml.scores": None},
        {"tokenizer.ggml.scores": [0.0]},
        {"tokenizer.ggml.remove_extra_whitespaces": True},
        {"tokenizer.ggml.add_space_prefix": True},
    ],
)
def test_sentencepiece_that_cannot_be_exact(gemma_like: Any, changes: dict[str, Any]) -> None:
    with pytest.raises((ModelFormatError, UnsupportedConfigError)):
        load({**gemma_like[1], **changes})
