"""The text and its segments."""

from __future__ import annotations

import pytest

from octavo.errors import EmptyPromptError, NotTextError, UsageError
from octavo.evaluate.text import Segments, Text


class Characters:
    """A tokenizer of one token a character."""

    def __init__(self, bos=None):
        self.bos_token_id = bos
        self.adds_bos = bos is not None

    def encode(self, text, *, parse_special):
        assert parse_special is False
        return list(map(ord, text))


def test_segments_are_the_text_without_overlap():
    found = Segments.of(Text("t", "abcdefg"), Characters(), tokens=6, segment_tokens=4)
    assert found.ids == (tuple(map(ord, "abcd")), tuple(map(ord, "ef")))
    assert found.scored_tokens == 3 + 1


def test_each_segment_begins_with_bos_where_the_model_wants_it():
    found = Segments.of(Text("t", "abcde"), Characters(bos=1), tokens=9, segment_tokens=4)
    assert found.ids == ((1, *map(ord, "abc")), (1, *map(ord, "de")))
    assert found.scored_tokens == 5


def test_a_last_token_alone_is_left_out():
    assert len(Segments.of(Text("t", "abcde"), Characters(), tokens=9, segment_tokens=4).ids) == 1


@pytest.mark.parametrize(("content", "has"), [("", "no tokens"), ("a", "one token")])
def test_a_text_of_too_few_tokens_is_refused(content, has):
    with pytest.raises(EmptyPromptError, match=f"t has {has}, and nothing can be scored"):
        Segments.of(Text("t", content), Characters(), tokens=9, segment_tokens=4)


def test_the_bundled_text_is_long_enough_and_plain():
    text = Text.bundled()
    assert text.content.isascii()
    assert "\r" not in text.content
    assert len(text.content) > 100_000
    assert "Alice was beginning to get very tired" in text.content


def test_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("häh", encoding="utf-8")
    assert Text.read(path).content == "häh"
    path.write_bytes(b"ab\xff")
    with pytest.raises(NotTextError, match="byte 2"):
        Text.read(path)
    with pytest.raises(UsageError, match="No such file"):
        Text.read(tmp_path / "missing")
    with pytest.raises(UsageError, match="directory"):
        Text.read(tmp_path)
