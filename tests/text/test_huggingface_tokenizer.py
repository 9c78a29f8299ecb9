"""tokenizer.json with its config, against transformers' tokenizer of the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from octavo.errors import ModelFormatError, NotTextError
from octavo.text.tokenizer import Tokenizer, load_tokenizer
from octavo.types import TokenizerSource


def load(data: str | bytes, config: dict[str, Any]) -> Tokenizer:
    return load_tokenizer(
        TokenizerSource("tokenizer.json", data.encode() if isinstance(data, str) else data, config=config)
    )


def peer(folder: Path, data: str, config: dict[str, Any]) -> Any:
    from transformers import PreTrainedTokenizerFast

    (folder / "tokenizer.json").write_text(data, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return PreTrainedTokenizerFast.from_pretrained(folder)


CONFIGS: list[dict[str, Any]] = [
    {"eos_token": "<|im_end|>"},
    {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "add_bos_token": False},
    {"bos_token": {"__type": "AddedToken", "content": "<|im_start|>", "lstrip": False}},
    {"eos_token": "<|im_end|>", "extra_special_tokens": {"tool_token": "[TOOL]"}},
    {"added_tokens_decoder": {"1208": {"content": "<|new|>", "special": True, "normalized": False}}},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_ids_special_tokens_and_bos_are_those_of_transformers(
    byte_level_json: str, config: dict[str, Any], tmp_path: Path
) -> None:
    ours, theirs = load(byte_level_json, config), peer(tmp_path, byte_level_json, config)
    text = " Hello\n\n  wörld 123 <|im_start|>x<think>[TOOL]<|new|>    ö<|im_end|>"
    assert ours.encode(text, parse_special=True) == theirs.encode(text, add_special_tokens=False)
    assert ours.encode_prompt("Hello", parse_special=True) == theirs.encode("Hello")
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.named_tokens == theirs.special_tokens_map
    assert ours.vocab_size == len(theirs)
    ids = ours.encode(text, parse_special=True)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, keep_special=True) == theirs.decode(ids)


@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
def test_tokens_the_config_lists_as_special(byte_level_json: str, key: str) -> None:
    tokenizer = load(byte_level_json, {key: ["<think>", {"content": "[TOOL]"}, "<not there>"]})
    assert {tokenizer.token_id("<think>"), tokenizer.token_id("[TOOL]")} <= tokenizer.special_token_ids
    assert tokenizer.token_id("<not there>") is None


def test_bos_from_the_post_processor(byte_level_json: str, tmp_path: Path) -> None:
    """As in Llama 3: the config does not mention add_bos_token."""
    data = json.loads(byte_level_json)
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            token: {"id": token, "ids": [token_id], "tokens": [token]}
            for token, token_id in (("<|im_start|>", 1201), ("<|im_end|>", 1202))
        },
    }
    ours = load(json.dumps(data), {})
    theirs = peer(tmp_path, json.dumps(data), {})
    assert ours.adds_bos
    assert ours.encode_prompt("Hello", parse_special=True) == theirs.encode("Hello")[:-1]  # never the eos


def test_bos_from_the_config(byte_level_json: str) -> None:
    """Where the post-processor adds nothing, as transformers 4 did for Llama and Gemma."""
    tokenizer = load(byte_level_json, {"bos_token": "<|endoftext|>", "add_bos_token": True})
    assert tokenizer.adds_bos
    assert tokenizer.encode_prompt("Hi", parse_special=False)[0] == tokenizer.bos_token_id


def test_bos_is_never_doubled(byte_level_json: str) -> None:
    tokenizer = load(byte_level_json, {"bos_token": "<|endoftext|>", "add_bos_token": True})
    bos = tokenizer.bos_token_id
    assert bos is not None
    written = tokenizer.encode_prompt("<|endoftext|>Hello", parse_special=True)
    assert written == tokenizer.encode_prompt("Hello", parse_special=True)
    assert written.count(bos) == 1
    assert tokenizer.begin([]) == [bos]
    assert tokenizer.begin(tokenizer.begin([5, 6])) == [bos, 5, 6]


@given(text=st.text())
def test_the_two_ways_to_encode_agree_on_benign_text(any_tokenizer: Tokenizer, text: str) -> None:
    assume(not any(token in text for token in any_tokenizer.added_tokens))
    assert any_tokenizer.encode(text, parse_special=False) == any_tokenizer.encode(text, parse_special=True)


def test_a_sentencepiece_shape(metaspace: Tokenizer, metaspace_json: str, tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    theirs = peer(tmp_path, metaspace_json, config)
    for text in ("the word", " two  spaces ", "日本 <s>x</s> y", "", "\n", "a<start_of_turn> \n b"):
        ids = metaspace.encode(text, parse_special=True)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert metaspace.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_padding_rows_decode_to_nothing(byte_level_json: str) -> None:
    source = TokenizerSource("tokenizer.json", byte_level_json.encode())
    padded = load_tokenizer(source, model_vocab_size=1280)
    assert padded.decode([padded.vocab_size, 1279]) == ""
    assert padded.spelling(1279) == ""


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
@pytest.mark.parametrize("parse_special", [True, False])
def test_lone_surrogates_are_not_text(byte_level: Tokenizer, text: str, parse_special: bool) -> None:
    with pytest.raises(NotTextError):
        byte_level.encode(text, parse_special=parse_special)


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe", b"[1, 2", b'{"version": "1.0", "model": null}'])
def test_unreadable_files(data: bytes) -> None:
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json"):
        load(data, {})


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": {"7": {"content": "<|new|>"}}},
        {"added_tokens_decoder": {"seven": {"content": "<|new|>"}}},
        {"bos_token": "<none>", "add_bos_token": True},
    ],
)
def test_configs_that_contradict_the_file(byte_level_json: str, config: dict[str, Any]) -> None:
    with pytest.raises(ModelFormatError):
        load(byte_level_json, config)
