"""JSON of checkpoints: strict, bounded, and never an exception of the parser's own."""

from __future__ import annotations

import contextlib
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import ModelFormatError
from octavo.sources.documents import parse_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(), VALUES), st.booleans())
def test_any_object_is_read_as_written(value: dict[str, object], ascii_only: bool):
    try:
        data = json.dumps(value, ensure_ascii=ascii_only).encode()
    except UnicodeEncodeError:
        return
    if _has_half_pair(value):
        with pytest.raises(ModelFormatError):
            parse_object(data, "config.json")
    else:
        assert parse_object(data, "config.json") == value


def _has_half_pair(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


@settings(deadline=None)
@given(st.binary())
def test_any_bytes_are_read_or_refused(data: bytes):
    with contextlib.suppress(ModelFormatError):
        assert isinstance(parse_object(data, "config.json"), dict)


def test_surrogate_pairs_are_characters():
    assert parse_object(b'{"a": "\\ud83e\\udd91"}', "x") == {"a": "🦑"}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "JSON"),
        (b"[]", "not an object"),
        (b'"text"', "not an object"),
        (b"null", "not an object"),
        (b"\xef\xbb\xbf{}", "JSON"),
        (b'{"a": 1} {}', "JSON"),
        (b'{"a": 1, "a": 2}', "'a' stands in it twice"),
        (b'{"x": {"a": 1, "a": 2}}', "'a' stands in it twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b"[" * 1_000_000, "deep"),
        (b'{"a":' * 1_000_000, "deep"),
        (b'{"a":' + b"1" * 100_000 + b"}", "JSON"),
        (b"[" + b"[]," * 1_000_001 + b"1]", "items"),
    ],
    ids=range(17),
)
def test_what_is_refused(data: bytes, says: str):
    start = time.perf_counter()
    with pytest.raises(ModelFormatError) as caught:
        parse_object(data, "config.json")
    assert time.perf_counter() - start < 1.0
    assert says in caught.value.message
    assert len(caught.value.message) < 500
