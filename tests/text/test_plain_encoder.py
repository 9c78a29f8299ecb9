"""No text becomes a control token, with any kind of vocabulary."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from octavo.errors import InvalidInputError
from octavo.text.tokenizer import Tokenizer, load_tokenizer
from octavo.text.vocabulary import is_ordinary_text
from octavo.types import TokenizerSource


def load(pipeline: tokenizers.Tokenizer, **config: str) -> Tokenizer:
    pipeline.decoder = decoders.ByteLevel()
    return load_tokenizer(TokenizerSource("tokenizer.json", pipeline.to_str().encode(), config=config))


def test_every_added_token_as_text(any_tokenizer: Tokenizer) -> None:
    assert any_tokenizer.reserved_token_ids >= any_tokenizer.special_token_ids
    for token in any_tokenizer.added_tokens:
        for text in (token, f"a{token}b", f" {token} ", token * 3, f"{token[:1]}{token}{token[1:]}"):
            ids = set(any_tokenizer.encode(text, parse_special=False))
            assert ids & any_tokenizer.reserved_token_ids <= {any_tokenizer.unknown_token_id}, text


def test_negative_control(any_tokenizer: Tokenizer) -> None:
    """The same texts do become tokens when asked to."""
    for token in any_tokenizer.added_tokens:
        if not is_ordinary_text(token):
            ids = any_tokenizer.encode(f"a{token}b", parse_special=True)
            assert any_tokenizer.added_tokens[token] in ids


@given(text=st.lists(st.sampled_from(["<s>", "</s>", "<", "s", ">", " ", "the", "<unk>", "é"])).map("".join))
def test_spelled_out_text_decodes_to_itself(any_tokenizer: Tokenizer, text: str) -> None:
    ids = any_tokenizer.encode(text, parse_special=False)
    if any_tokenizer.unknown_token_id not in ids:
        assert any_tokenizer.decode(ids).strip() == text.strip()


def test_ordinary_added_tokens_stay_whole(byte_level: Tokenizer) -> None:
    for token in ("    ", "<table>", "õ"):
        assert byte_level.encode(token, parse_special=False) == [byte_level.added_tokens[token]]


@pytest.mark.parametrize("token", ["  ", "\n\n", "▁▁", "õ", "÷", "<h1>", "</table>", "mañana", "123"])
def test_ordinary(token: str) -> None:
    assert is_ordinary_text(token)


@pytest.mark.parametrize(
    "token", ["<s>x", "<think>", "</think>", "[INST]", "<|im_end|>", "▁<PRE>", "<tool>", "{x}", "##"]
)
def test_not_ordinary(token: str) -> None:
    assert not is_ordinary_text(token)


def test_ordinary_tokens_outside_the_model_keep_their_ids() -> None:
    """As GPT-NeoX's runs of spaces, which only the list of added tokens has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pipeline = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.add_special_tokens(["<|end|>"])
    pipeline.add_tokens([AddedToken("<tool>"), AddedToken("   ")])
    tokenizer = load(pipeline)
    assert tokenizer.encode("<|end|>   ", parse_special=False)[-1] == tokenizer.added_tokens["   "] == 258


def test_a_vocabulary_that_skips_its_merges() -> None:
    """Without merges "halt" cannot be reached, but ignore_merges finds the whole word."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: number for number, character in enumerate([*alphabet, "halt"])}
    pipeline = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.add_special_tokens(["halt"])
    tokenizer = load(pipeline)
    assert tokenizer.encode("halt", parse_special=True) == [256]
    assert tokenizer.encode("halt", parse_special=False) == [vocab[letter] for letter in "halt"]


@pytest.mark.parametrize("config", [{}, {"unk_token": "<unk>"}], ids=str)
def test_unknown_characters_are_not_spelled_out(config: dict[str, str]) -> None:
    """Whether or not the config names the token that stands for them."""
    pieces = [("<unk>", 0.0), ("<", -1.0), (">", -1.0), ("u", -1.0), ("n", -1.0), ("k", -1.0)]
    pipeline = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    pipeline.add_special_tokens(["<unk>"])
    tokenizer = load(pipeline, **config)
    assert tokenizer.unknown_token_id == 0
    assert tokenizer.encode("uéu", parse_special=False) == [3, 0, 3]
    assert tokenizer.encode("<unk>", parse_special=False) == [1, 3, 4, 5, 2]


def test_a_character_that_is_a_control_token_is_refused() -> None:
    vocab = {"<unk>": 0, "a": 1, "§": 2}
    pipeline = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    pipeline.pre_tokenizer = pre_tokenizers.Whitespace()
    pipeline.add_special_tokens(["<unk>", "§"])
    tokenizer = load(pipeline, unk_token="<unk>")
    assert tokenizer.encode("a b", parse_special=False) == [1, 0]
    with pytest.raises(InvalidInputError, match="§"):
        tokenizer.encode("a §", parse_special=False)
