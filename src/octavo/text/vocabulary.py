"""What a tokenizer file says, in one shape for every kind of file: the loaders' result.

Also decides which added tokens are mere text and which are reserved, so that both kinds of file agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.text.pieces import PieceDecoder

if TYPE_CHECKING:
    import tokenizers

_HTML_TAGS = frozenset(
    tag
    for element in (
        "a b blockquote body caption code div em footer h1 h2 h3 h4 h5 h6 html i iframe img li s span strong "
        "sub sup table tbody td tfoot th thead tr u ul"
    ).split()
    for tag in (f"<{element}>", f"</{element}>")
)
"""Tags that vocabularies (Gemma's) keep whole because they were common in training text."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A loaded tokenizer file."""

    pipeline: tokenizers.Tokenizer
    """Text -> ids, added tokens included; adds nothing of its own when asked not to."""
    size: int
    """One more than the largest id."""
    decoder: PieceDecoder
    named_tokens: Mapping[str, str]
    """The spellings chat templates see: {"bos_token": "<s>", "eos_token": "</s>", ...}."""
    unknown_token_id: int | None
    """What stands for characters the vocabulary lacks; None where there are none, as with byte-level BPE."""
    end_token_ids: frozenset[int]
    """Ids the file itself calls an end: of sequence, of turn, of message."""
    prefix_token_ids: tuple[int, ...]
    """What every prompt starts with: () or, as a rule, (BOS,)."""
    special_token_ids: frozenset[int]
    """Ids that are not text; decoding leaves them out."""
    notices: tuple[str, ...] = ()


def is_ordinary_text(token: str) -> bool:
    """Whether an added token that is not special is text like any other: typing it controls nothing.

    Runs of whitespace, words, single characters ("õ" in DeepSeek's vocabularies) and HTML tags. Anything else,
    such as "<think>" or "[TOOL]", may mean something to a chat template, and is reserved.
    """
    if len(token) == 1 or token in _HTML_TAGS:
        return True
    return all(character.isalnum() or character.isspace() or character == "▁" for character in token)


def mark_special(pipeline: tokenizers.Tokenizer, spellings: Iterable[str]) -> None:
    """Make tokens of the vocabulary special that the file only names as such; others are left alone.

    A name without an id has no row in the model: giving it one would invent a token.
    """
    import tokenizers

    special = {token.content for token in pipeline.get_added_tokens_decoder().values() if token.special}
    missing = [spelling for spelling in dict.fromkeys(spellings) if spelling and spelling not in special]
    pipeline.add_special_tokens(
        [
            tokenizers.AddedToken(spelling, special=True, normalized=False)
            for spelling in missing
            if pipeline.token_to_id(spelling) is not None
        ]
    )


def special_ids(pipeline: tokenizers.Tokenizer) -> frozenset[int]:
    return frozenset(
        token_id for token_id, token in pipeline.get_added_tokens_decoder().items() if token.special
    )
