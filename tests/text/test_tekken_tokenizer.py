"""tekken.json against tiktoken on the same ranks."""

from __future__ import annotations

import base64
import itertools
import json
import tracemalloc
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import ModelFormatError
from octavo.text.tekken_tokenizer import _merges
from octavo.text.tokenizer import Tokenizer, load_tokenizer
from octavo.types import TokenizerSource

SPECIALS = 24
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def ranks(corpus: list[str]) -> dict[bytes, int]:
    """A BPE trained by counting pairs: enough merges to be interesting."""
    words = [[bytes([b]) for b in word.encode()] for text in corpus[:6] for word in text.split(" ")][:1500]
    found = {bytes([b]): b for b in range(256)}
    while len(found) < 420:
        counts: dict[bytes, int] = {}
        for word in words:
            for left, right in itertools.pairwise(word):
                counts[left + right] = counts.get(left + right, 0) + 1
        best = max((pair for pair in counts if pair not in found), key=lambda pair: (counts[pair], pair))
        found[best] = len(found)
        for word in words:
            at = 0
            while at < len(word) - 1:
                if word[at] + word[at + 1] == best:
                    word[at : at + 2] = [best]
                at += 1
    return found


@pytest.fixture(scope="module")
def file(corpus: list[str]) -> dict[str, Any]:
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
        for piece, rank in ranks(corpus).items()
    ]
    return {
        "config": {
            "pattern": PATTERN,
            "num_vocab_tokens": len(entries),
            "default_vocab_size": SPECIALS + len(entries) - 20,  # the file lists more than the model has
            "default_num_special_tokens": SPECIALS,
            "version": "v7",
        },
        "vocab": entries,
        "special_tokens": [
            {"rank": rank, "token_str": text, "is_control": True}
            for rank, text in enumerate(["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"])
        ],
    }


@pytest.fixture(scope="module")
def pair(file) -> tuple[Tokenizer, tiktoken.Encoding]:
    kept = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in file["vocab"][:-20]}
    theirs = tiktoken.Encoding("tekken", pat_str=PATTERN, mergeable_ranks=kept, special_tokens={})
    return load_tokenizer(TokenizerSource("tekken", data=json.dumps(file).encode())), theirs


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60) | st.text(st.sampled_from("thean \n12.,"), max_size=60))
def test_ids_are_tiktokens(pair, text: str) -> None:
    ours, theirs = pair
    ids = ours.encode(text, parse_special=False)
    assert ids == [SPECIALS + rank for rank in theirs.encode_ordinary(text)]
    assert ours.decode(ids) == text


def test_special_tokens(pair) -> None:
    ours, _ = pair
    assert ours.encode_prompt("[INST]", parse_special=True) == [1, 3]
    assert 3 not in ours.encode_prompt("[INST]", parse_special=False)
    assert (ours.bos_token_id, ours.eos_token_id, ours.token_id("<SPECIAL_20>")) == (1, 2, 20)
    assert ours.decode([3, 20]) == ""


def test_an_old_file_has_the_known_special_tokens(file) -> None:
    old = {key: value for key, value in file.items() if key != "special_tokens"}
    ours = load_tokenizer(TokenizerSource("tekken", data=json.dumps(old).encode()))
    assert ours.token_id("[TOOL_CALLS]") == 9


@pytest.mark.parametrize(
    "broken",
    [b"", b"[]", b"{", b'{"config": {}}', b'{"config": null}'],
)
def test_damaged_files_are_named(broken: bytes) -> None:
    with pytest.raises(ModelFormatError, match=r"tekken\.json"):
        load_tokenizer(TokenizerSource("tekken", data=broken))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: f["vocab"].pop(5), "ranks"),
        (lambda f: f["vocab"][0].update(token_bytes="!"), "Error"),
        (lambda f: f["vocab"][1].update(token_bytes=f["vocab"][2]["token_bytes"]), "equal"),
        (lambda f: f["special_tokens"].append({"rank": 99, "token_str": "x"}), "special token of rank 99"),
        (lambda f: f["config"].update(pattern="("), "cannot be used"),
        (lambda f: f["config"].update(default_num_special_tokens=1 << 40), "special tokens"),
        (
            lambda f: f["config"].update(default_num_special_tokens=1 << 21, default_vocab_size=1 << 22),
            "special tokens",
        ),
        (lambda f: f["config"].update(default_num_special_tokens=-1), "special tokens"),
        (
            lambda f: f["vocab"][300].update(token_bytes=base64.b64encode(bytes(513)).decode()),
            "513 bytes; at most 512",
        ),
    ],
)
def test_contradictions_are_named(file, change, reason: str) -> None:
    broken = json.loads(json.dumps(file))
    change(broken)
    with pytest.raises(ModelFormatError, match=reason):
        load_tokenizer(TokenizerSource("tekken", data=json.dumps(broken).encode()))


def test_a_long_token_keeps_no_more_than_its_merges(file) -> None:
    """512 bytes are taken, and looking for the ways to cut them holds none that is no merge."""
    long = json.loads(json.dumps(file))
    long["vocab"][300].update(token_bytes=base64.b64encode(bytes(512)).decode())
    data = json.dumps(long).encode()
    assert load_tokenizer(TokenizerSource("tekken", data=data)).encode("\0" * 512, parse_special=False) == [
        324
    ]
    pieces = ["ab" * 256] * 400
    tracemalloc.start()
    try:
        assert _merges(pieces) == []
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
