"""Prefix keys: golden values, the chain's definition, and that nothing that matters is left out."""

from __future__ import annotations

import hashlib
import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine.prefix import extend_keys, root_key

TOKENS = list(range(1000, 1100))
GOLDEN = [
    "49c2d61bca20cd7e50ab3c77e5df2b3b67ab5b2749db18df99f877c4570ba948",
    "1a14337f0f3459835d486e5bfee9564076c0bbe421fff11657c352bd4da18777",
    "9cb5a86369bf414f00cd75e67e0a8f58ff69feed11b6ae4604bfb41f7f2ce43f",
]


def prefix_keys(weights, adapter, salt, tokens):
    keys = []
    extend_keys(keys, root_key(weights, adapter, salt), tokens)
    return keys


def test_golden():
    """A change here makes every stored key worthless: change the tag too."""
    keys = prefix_keys("weights", None, "", TOKENS)
    assert [key.hex() for key in keys] == GOLDEN


def test_the_chain_by_hand():
    root = (
        b"octavo prefix 1\0"
        + b"\1"
        + struct.pack("<Q", 2)
        + b"w8"
        + b"\0"
        + b"\1"
        + struct.pack("<Q", 1)
        + b"s"
    )
    first = hashlib.sha256(hashlib.sha256(root).digest() + struct.pack("<32I", *TOKENS[:32])).digest()
    second = hashlib.sha256(first + struct.pack("<32I", *TOKENS[32:64])).digest()
    assert prefix_keys("w8", None, "s", TOKENS[:64]) == [first, second]


@given(st.integers(0, 200))
def test_one_key_a_full_page_and_prefixes_agree(length):
    tokens = [token % 50 for token in range(length)]
    keys = prefix_keys("w", "a", "s", tokens)
    assert len(keys) == length // 32
    assert keys == prefix_keys("w", "a", "s", tokens + [7] * 50)[: len(keys)]


def test_everything_that_matters_separates():
    """Every pair differs in one field, or moves a character over a border between two fields."""
    variants = [
        ("weights", None, "", TOKENS),
        ("weights2", None, "", TOKENS),
        ("weights", "", "", TOKENS),
        ("weights", "adapter", "", TOKENS),
        ("weights", None, "adapter", TOKENS),
        ("weight", "sadapter", "", TOKENS),
        ("weights", "adapte", "r", TOKENS),
        ("weights\0", None, "", TOKENS),
        ("weights", None, "\0", TOKENS),
        ("weights", None, "\ud800", TOKENS),
        ("weights", None, "é", TOKENS),
        ("weights", None, "e\u0301", TOKENS),
        ("weights", None, "", [TOKENS[0] + 1, *TOKENS[1:]]),
        ("weights", None, "", [*TOKENS[:31], TOKENS[31] + 1, *TOKENS[32:]]),
        ("weights", None, "", TOKENS[1::-1] + TOKENS[2:]),
    ]
    last = [prefix_keys(*variant)[-1] for variant in variants]
    assert len(set(last)) == len(variants)
    pages = prefix_keys("weights", None, "", [5] * 96)
    assert len(set(pages)) == 3, "equal pages at other places have other keys"


@given(
    *[st.tuples(st.text(max_size=3), st.none() | st.text(max_size=3), st.text(max_size=3)) for _ in range(2)]
)
@settings(max_examples=60)
def test_the_encoding_is_unambiguous(one, other):
    assert (prefix_keys(*one, TOKENS) == prefix_keys(*other, TOKENS)) == (one == other)
