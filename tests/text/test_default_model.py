"""The default model's tokenizer, against transformers with the pre-tokenizer its GGUF names."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from octavo.text.stop_tokens import stop_token_ids
from octavo.text.tokenizer import Tokenizer

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def peer(default_metadata: dict[str, Any]) -> Any:
    """transformers' conversion has no digit splitting; with it, it equals llama.cpp on all of 900 chunks."""
    from transformers import GPT2Tokenizer

    tokens = default_metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in default_metadata["tokenizer.ggml.merges"]]
    tokenizer = GPT2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    kinds = default_metadata["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens({"additional_special_tokens": control})
    return tokenizer


def test_known_ids(default_tokenizer: Tokenizer) -> None:
    """Without digit splitting the end would be 198, 198, 33."""
    assert default_tokenizer.encode("Items:\n\n1.", parse_special=True)[-3:-1] == [1116, 33]
    assert (default_tokenizer.bos_token_id, default_tokenizer.eos_token_id) == (1, 2)
    assert not default_tokenizer.adds_bos
    assert default_tokenizer.vocab_size == 49_152


def test_a_thousand_chunks(default_tokenizer: Tokenizer, peer: Any, corpus: list[str]) -> None:
    text, draw = "\n".join(corpus), random.Random(11)
    for _ in range(1_000):
        start = draw.randrange(len(text))
        chunk = text[start : start + draw.randrange(1, 500)]
        ids = default_tokenizer.encode(chunk, parse_special=False)
        assert ids == peer.encode(chunk, add_special_tokens=False)
        assert default_tokenizer.decode(ids) == chunk


@given(text=st.one_of(st.text(), st.text(st.sampled_from("0123 a.\n<|im_end>_strd"), max_size=50)))
@settings(max_examples=300, deadline=None)
def test_any_text(default_tokenizer: Tokenizer, peer: Any, text: str) -> None:
    ids = default_tokenizer.encode(text, parse_special=True)
    assert ids == peer.encode(text, add_special_tokens=False)
    assert default_tokenizer.decode(ids) == peer.decode(ids, skip_special_tokens=True)


def test_ten_thousand_random_strings(default_tokenizer: Tokenizer, peer: Any) -> None:
    """Words, spaces, digits, control tokens and characters of many scripts, in any order: the same ids, and the text
    again."""
    draw = np.random.default_rng(34)
    scripts = [(0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x621, 0x64A)]
    scripts += [
        (0x905, 0x939),
        (0xE01, 0xE3A),
        (0x3041, 0x3096),
        (0x4E00, 0x9FA5),
        (0xAC00, 0xD7A3),
        (0x1F600, 0x1F64F),
    ]
    words = [" the", "ing", "\n\n", "\t", "   ", "123", "'s", "def f(x):", "<|im_end|>", "\u0301", "\u200d"]
    wrong = []
    for _ in range(10_000):
        low, high = scripts[draw.integers(len(scripts))]
        letters = map(chr, draw.integers(low, high + 1, draw.integers(1, 12)).tolist())
        pieces = [*letters, *draw.choice(words, draw.integers(0, 4)).tolist()]
        draw.shuffle(pieces)
        text = "".join(pieces)
        ids = default_tokenizer.encode(text, parse_special=True)
        if (
            ids != peer.encode(text, add_special_tokens=False)
            or default_tokenizer.decode(ids, keep_special=True) != text
        ):
            wrong.append(text)
    assert not wrong


@given(ids=st.lists(st.integers(0, 49_151), max_size=20))
@settings(max_examples=300, deadline=None)
def test_any_ids(default_tokenizer: Tokenizer, peer: Any, ids: list[int]) -> None:
    assert default_tokenizer.decode(ids) == peer.decode(ids, skip_special_tokens=True)
    assert default_tokenizer.decode(ids, keep_special=True) == peer.decode(ids)


def test_stops(default_tokenizer: Tokenizer) -> None:
    assert stop_token_ids({"eos_token_id": 2}, {}, default_tokenizer) == {0, 2}
