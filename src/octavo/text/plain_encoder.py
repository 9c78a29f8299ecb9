"""Encodes text so that it can never become a control token, whatever it spells.

The tokenizer's own pipeline, sharing its vocabulary and merges, but without its added tokens. That alone is
not a boundary: Unigram vocabularies contain "<s>", and a vocabulary that may skip its merges matches whole
words. So ids are checked, and a reserved one is spelled out, one character of the piece after the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from octavo.errors import InvalidInputError

if TYPE_CHECKING:
    import tokenizers


class PlainEncoder:
    """Immutable after construction: safe to use from several threads."""

    def __init__(
        self,
        full: tokenizers.Tokenizer,
        *,
        reserved: frozenset[int],
        unknown_token_id: int | None,
        ordinary: Mapping[int, tokenizers.AddedToken],
    ) -> None:
        """`reserved`: ids that never come out. `ordinary`: added tokens that are mere text, and stay."""
        self._full = full
        self._reserved = reserved
        self._unknown = unknown_token_id
        self._at_start, self._ids = _without_added_tokens(full, full.pre_tokenizer, ordinary)
        inside = _never_prefixed(full.pre_tokenizer)
        self._inside = self._at_start if inside is None else _without_added_tokens(full, inside, ordinary)[0]

    def encode(self, text: str, *, at_start: bool = True) -> list[int]:
        """`at_start`: the text starts a prompt, where SentencePiece vocabularies may put a dummy space.

        Raises InvalidInputError where a character of the text is itself a reserved token.
        """
        pipeline = self._at_start if at_start else self._inside
        encoding = pipeline.encode(text, add_special_tokens=False)
        ids = [self._ids.get(token_id, token_id) for token_id in encoding.ids]
        if self._reserved.isdisjoint(ids):
            return ids
        spelled: list[int] = []
        for token_id, (start, end) in zip(ids, encoding.offsets, strict=True):
            if token_id not in self._reserved or self._is_unknown(token_id, text[start:end]):
                spelled.append(token_id)
            else:
                spelled += self._spell_out(token_id)
        return spelled

    def _is_unknown(self, token_id: int, source: str) -> bool:
        """An id for characters the vocabulary lacks, rather than for its own spelling typed as text."""
        return token_id == self._unknown and source.strip() != self._full.id_to_token(token_id)

    def _spell_out(self, token_id: int) -> list[int]:
        piece = self._full.id_to_token(token_id) or ""
        ids = [token.id for character in piece for token in self._full.model.tokenize(character)]
        if not self._reserved.isdisjoint(set(ids) - {self._unknown}):
            raise InvalidInputError(
                f"the text contains {piece!r}, which this vocabulary can only spell as a control token",
                remedy="Remove it from the text, or rewrite it with other characters.",
            )
        return ids


def _without_added_tokens(
    full: tokenizers.Tokenizer,
    pre_tokenizer: tokenizers.pre_tokenizers.PreTokenizer | None,
    ordinary: Mapping[int, tokenizers.AddedToken],
) -> tuple[tokenizers.Tokenizer, Mapping[int, int]]:
    """A pipeline over the same model, and its ids where they differ from the full tokenizer's."""
    import tokenizers

    bare = tokenizers.Tokenizer(full.model)
    # Assigning None would raise: an unset stage is None already.
    if full.normalizer is not None:
        bare.normalizer = full.normalizer
    if pre_tokenizer is not None:
        bare.pre_tokenizer = pre_tokenizer
    bare.add_tokens(list(ordinary.values()))
    renumbered = {bare.token_to_id(token.content): token_id for token_id, token in ordinary.items()}
    return bare, {ours: theirs for ours, theirs in renumbered.items() if ours is not None and ours != theirs}


def _never_prefixed(
    pre_tokenizer: tokenizers.pre_tokenizers.PreTokenizer | None,
) -> tokenizers.pre_tokenizers.PreTokenizer | None:
    """The same pre-tokenizer for text inside a prompt; None where position makes no difference.

    Only Metaspace with prepend_scheme "first" looks at the position in the whole text. (Every other stage sees
    one stretch between added tokens at a time, and so does this encoder.)
    """
    if pre_tokenizer is None:
        return None
    import tokenizers

    section = json.loads(pre_tokenizer.__getstate__())
    if not _stop_prepending(section):
        return None
    # The library builds a pre-tokenizer from its description only as part of a tokenizer: an empty one will do.
    shell = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    rebuilt = tokenizers.Tokenizer.from_str(json.dumps({**shell, "pre_tokenizer": section}))
    inside: tokenizers.pre_tokenizers.PreTokenizer | None = rebuilt.pre_tokenizer
    return inside


def _stop_prepending(section: dict[str, Any]) -> bool:
    if section.get("type") == "Sequence":
        changed = [_stop_prepending(child) for child in section["pretokenizers"]]
        return any(changed)
    if section.get("type") == "Metaspace" and section.get("prepend_scheme") == "first":
        section["prepend_scheme"] = "never"
        return True
    return False
