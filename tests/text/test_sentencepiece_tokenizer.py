"""tokenizer.model without a tokenizer.json: ids and text against the sentencepiece library's own."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import ModelFormatError, UnsupportedConfigError
from octavo.text.sentencepiece_merges import merges_from_scores
from octavo.text.sentencepiece_model import PieceType
from octavo.text.tokenizer import Tokenizer, load_tokenizer
from octavo.types import TokenizerSource

MODELS = {
    "llama": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
    "gemma": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<table>", "▁▁▁▁", "▁▁", "<mark>"],
    },
    "bpe without bytes": {"model_type": "bpe", "normalization_rule_name": "identity"},
    "unigram": {"model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "identity"},
    "unigram, normalized": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc", "spaces": True},
    "unigram, no prefix": {
        "model_type": "unigram",
        "normalization_rule_name": "nfkc_cf",
        "add_dummy_prefix": False,
        "byte_fallback": True,
    },
}
CATEGORIES = ("Cs", "Cn", "Co", "Mn", "Me", "Mc")
"""Left out of random texts. Marks: the tokenizers library's Precompiled normalizer looks a letter up together with
the marks on it, and drops them where only the letter has an entry (U+0041 U+1CD0 under nfkc_cf); sentencepiece keeps
them."""
TEXTS = [
    "",
    "a",
    "Hello, world!",
    "  two  spaces   three ",
    "\tTabs\nand\n\nlines\r\n",
    "naïve café — “quotes” … ﬁ ligature",
    "日本語 中文 한국어 🙂🙂 \U0001f468\u200d\U0001f469",
    "1234567890 3.14",
    "<table><mark>x</mark>",
    "\u00a0 \u3000 ½ ² Ａ",
    "x" * 60,
]


@pytest.fixture(scope="module", params=MODELS)
def pair(
    request, corpus: list[str], tmp_path_factory
) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    options = dict(MODELS[request.param])
    folder: Path = tmp_path_factory.mktemp("model")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in corpus[:20] for line in text.splitlines() if line),
        model_prefix=str(folder / "model"),
        vocab_size=900,
        remove_extra_whitespaces=options.pop("spaces", False),
        control_symbols=["<turn>"],
        num_threads=1,
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    data = (folder / "model.model").read_bytes()
    return load_tokenizer(TokenizerSource("sentencepiece", data=data)), sentencepiece.SentencePieceProcessor(
        model_file=str(folder / "model.model")
    )


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text(pair, text: str) -> None:
    ours, theirs = pair
    ids = ours.encode(text, parse_special=True)  # user-defined pieces are found, as sentencepiece finds them
    assert ids == theirs.encode(text)
    unknown = theirs.unk_id()
    if unknown not in ids:
        assert ours.decode(ids) == theirs.decode(ids)


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=CATEGORIES, exclude_characters="\x00▁"), max_size=40))
def test_any_text(pair, text: str) -> None:
    ours, theirs = pair
    assert ours.encode(text, parse_special=False) == theirs.encode(text)


def test_special_tokens(pair) -> None:
    ours, theirs = pair
    assert ours.bos_token_id == theirs.bos_id()
    assert ours.eos_token_id == theirs.eos_id()
    assert ours.encode_prompt("a", parse_special=False)[0] == theirs.bos_id()
    turn = theirs.piece_to_id("<turn>")
    assert turn in ours.special_token_ids
    assert turn in ours.encode("<turn>", parse_special=True)
    assert turn not in ours.encode("<turn></s><s>", parse_special=False)
    assert ours.decode([turn]) == ""


@pytest.fixture(scope="module")
def model(llama_like) -> bytes:
    data: bytes = llama_like[0].serialized_model_proto()
    return data


def test_the_config_has_a_say(model: bytes) -> None:
    config = {
        "add_bos_token": False,
        "eos_token": "<end_of_turn>",
        "added_tokens_decoder": {"1000": {"content": "<new>", "special": True}},
    }
    tokenizer = load_tokenizer(TokenizerSource("sentencepiece", data=model, config=config))
    assert tokenizer.encode_prompt("a<new>", parse_special=True)[-1] == 1000
    assert not tokenizer.adds_bos
    assert tokenizer.spelling(tokenizer.eos_token_id or 0) == "<end_of_turn>"


def test_damaged_files_are_named(model: bytes) -> None:
    for data in (b"", b"\x0a\xff\xff\xff\xff\x0f", model[:1000], b"{}", b"\x0b" + model):
        with pytest.raises(ModelFormatError, match=r"tokenizer\.model"):
            load_tokenizer(TokenizerSource("sentencepiece", data=data))


def test_a_piece_of_any_length_takes_no_time() -> None:
    """All cuts of a megabyte are 10 ** 12 bytes of text."""
    started = time.perf_counter()
    with pytest.raises(ModelFormatError, match="1000000 characters; at most 512"):
        merges_from_scores(["a", "a" * 1_000_000], [PieceType.NORMAL] * 2, [0.0, 0.0])
    assert time.perf_counter() - started < 1
    pieces = ["a", "a" * 511, "a" * 512, "b" * 10_000]
    types = [PieceType.NORMAL] * 3 + [PieceType.USER_DEFINED]
    merges = merges_from_scores(pieces, types, [0.0] * 4)
    assert sorted(map(len, merges[0])) == [1, 511]
    assert len(merges) == 2


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_mutation_is_read_or_named(model: bytes, data: st.DataObject) -> None:
    mutant = bytearray(model)
    for _ in range(data.draw(st.integers(1, 4))):
        mutant[data.draw(st.integers(0, len(mutant) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ModelFormatError, UnsupportedConfigError):
        load_tokenizer(TokenizerSource("sentencepiece", data=bytes(mutant)))
