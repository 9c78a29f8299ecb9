"""Text <-> token ids. Built on the tokenizers library; `load_tokenizer` reads every kind of source.

Two ways to encode: text that may contain control tokens (a raw prompt whose writer asked for it), and text
that must not produce any, whatever it spells (everything else). Decoding goes through bytes, so that it can be
streamed (`octavo.text.detokenizer`) with the same result.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence

from octavo.errors import InvalidInputError, NotTextError
from octavo.text.plain_encoder import PlainEncoder
from octavo.text.vocabulary import Vocabulary, is_ordinary_text
from octavo.types import TokenizerSource


def load_tokenizer(source: TokenizerSource, *, model_vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a model.

    `model_vocab_size`: rows of the model's embedding, V, where known. Models are often padded: ids from the
    tokenizer's vocabulary up to V can be sampled, and decode to nothing.

    Raises ModelFormatError for a damaged tokenizer, UnsupportedConfigError for one that cannot be reproduced
    exactly.
    """
    match source.kind:
        case "tokenizer.json":
            from octavo.text.huggingface_tokenizer import load_tokenizer_json

            vocabulary = load_tokenizer_json(source.data, source.config)
        case "gguf":
            from octavo.text.gguf_tokenizer import load_gguf_tokenizer

            vocabulary = load_gguf_tokenizer(source.metadata)
        case "sentencepiece":
            from octavo.text.sentencepiece_tokenizer import load_sentencepiece

            vocabulary = load_sentencepiece(source.data, source.config)
        case "tekken":
            from octavo.text.tekken_tokenizer import load_tekken

            vocabulary = load_tekken(source.data, source.config)
    return Tokenizer(vocabulary, model_vocab_size=model_vocab_size)


class Tokenizer:
    """Immutable after construction but for a cache of token bytes; safe to use from several threads."""

    def __init__(self, vocabulary: Vocabulary, *, model_vocab_size: int | None = None) -> None:
        self._pipeline = vocabulary.pipeline
        self._decoder = vocabulary.decoder
        self._prefix = list(vocabulary.prefix_token_ids)
        added = self._pipeline.get_added_tokens_decoder()
        self.added_tokens: Mapping[str, int] = {token.content: id_ for id_, token in added.items()}
        """Every token that is matched as a whole before text is cut: spelling -> id."""
        self.special_token_ids = vocabulary.special_token_ids
        """Ids that are not text: `decode` leaves them out."""
        self.unknown_token_id = vocabulary.unknown_token_id
        """What stands for characters the vocabulary lacks; None if it can spell them all, or drops them."""
        self.end_token_ids = vocabulary.end_token_ids
        """What the tokenizer's own files call an end; `octavo.text.stop_tokens` knows more."""
        self.named_tokens = vocabulary.named_tokens
        """The spellings chat templates see, such as {"bos_token": "<s>"}."""
        self.notices = vocabulary.notices
        """Facts the user should see."""
        ordinary = {
            id_: token
            for id_, token in added.items()
            if id_ not in self.special_token_ids and is_ordinary_text(token.content)
        }
        self.reserved_token_ids = frozenset(added) - frozenset(ordinary)
        """Ids that message text can never become: special tokens, and added ones that are not mere text."""
        self.vocab_size = vocabulary.size
        """One more than the largest id of the tokenizer."""
        self._decodable = max(self.vocab_size, model_vocab_size or 0)
        self._plain = PlainEncoder(
            self._pipeline,
            reserved=self.reserved_token_ids,
            unknown_token_id=self.unknown_token_id,
            ordinary=ordinary,
        )
        self._added_ids = frozenset(added)
        self._bytes: dict[tuple[int, bool], bytes] = {}

    # --- ids and spellings ---

    def token_id(self, spelling: str) -> int | None:
        """The id of a token as the vocabulary spells it ("Ġthe", "<s>"); None if there is none."""
        token_id: int | None = self._pipeline.token_to_id(spelling)
        return token_id

    def spelling(self, token_id: int) -> str:
        """How the vocabulary spells a token; "" for a row without a token. Raises InvalidInputError."""
        piece: str | None = self._pipeline.id_to_token(self._checked(token_id))
        return "" if piece is None else piece

    def _named_id(self, name: str) -> int | None:
        spelling = self.named_tokens.get(name)
        return None if spelling is None else self.token_id(spelling)

    @property
    def bos_token_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._named_id("eos_token")

    @property
    def adds_bos(self) -> bool:
        """Whether prompts start with BOS (for a few models, with other tokens)."""
        return bool(self._prefix)

    # --- text -> ids ---

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """The ids of a text, without BOS. [] for "".

        `parse_special`: spellings of added tokens become those tokens. Otherwise none comes out, whatever the
        text spells. The two agree on every text that contains no such spelling.

        Raises NotTextError for lone surrogates; InvalidInputError where a reserved token cannot be avoided.
        """
        if not parse_special:
            return self.encode_plain(text)
        check_text(text)
        return list(self._pipeline.encode(text, add_special_tokens=False).ids)

    def encode_plain(self, text: str, *, at_start: bool = True) -> list[int]:
        """`encode(parse_special=False)` of a stretch of a prompt; `at_start`: it is the prompt's first."""
        check_text(text)
        return self._plain.encode(text, at_start=at_start)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode(parse_special=True)`, and for each id the characters [start, end) it came from."""
        check_text(text)
        encoding = self._pipeline.encode(text, add_special_tokens=False)
        return list(encoding.ids), list(encoding.offsets)

    def begin(self, token_ids: Sequence[int]) -> list[int]:
        """A prompt's ids with BOS in front exactly once: added if the tokenizer adds it and it is not there."""
        if list(token_ids[: len(self._prefix)]) == self._prefix:
            return list(token_ids)
        return [*self._prefix, *token_ids]

    def encode_prompt(self, text: str, *, parse_special: bool) -> list[int]:
        """The ids of a raw prompt: `begin(encode(text))`."""
        return self.begin(self.encode(text, parse_special=parse_special))

    # --- ids -> text ---

    def decode(
        self, token_ids: Iterable[int], *, keep_special: bool = False, continuation: bool = False
    ) -> str:
        """The text of ids. Bytes that are not UTF-8 become U+FFFD, one for each maximal invalid part.

        `keep_special`: special tokens are spelled out instead of left out. `continuation`: the ids follow other
        text, so the space that SentencePiece vocabularies put before a text's first word is real and stays.

        Raises InvalidInputError for an id outside the vocabulary.
        """
        first = not continuation
        parts = []
        for token_id in token_ids:
            part = self.token_bytes(token_id, first=first, keep_special=keep_special)
            if part is not None:
                parts.append(part)
                first = False
        text = b"".join(parts).decode("utf-8", errors="replace")
        return text if continuation else self.drop_leading_spaces(text)

    def token_bytes(self, token_id: int, *, first: bool, keep_special: bool = False) -> bytes | None:
        """The bytes one token adds to a text; None for a special one that is left out.

        `first`: no token before it added any. Raises InvalidInputError for an id outside the vocabulary.
        """
        if not keep_special and token_id in self.special_token_ids:
            return None
        known = self._bytes.get((token_id, first))
        if known is None:
            piece = self.spelling(token_id)
            known = self._decoder.to_bytes(piece, first=first, added=token_id in self._added_ids)
            self._bytes[token_id, first] = known
        return known

    @property
    def leading_spaces(self) -> int:
        """Spaces that decoding removes from the start of a text, at most."""
        return self._decoder.leading_spaces

    def drop_leading_spaces(self, text: str) -> str:
        spaces = len(text) - len(text.lstrip(" "))
        return text[min(spaces, self.leading_spaces) :]

    def _checked(self, token_id: int) -> int:
        try:
            number = operator.index(token_id)
        except TypeError:
            raise InvalidInputError(
                f"a token id is a whole number, not {type(token_id).__name__}",
                remedy=f"Use ids from 0 to {self._decodable - 1}.",
            ) from None
        if not 0 <= number < self._decodable:
            raise InvalidInputError(
                f"token id {number} is outside the vocabulary of {self._decodable} tokens",
                remedy=f"Use ids from 0 to {self._decodable - 1}.",
            )
        return number


def check_text(text: str) -> None:
    """Raises NotTextError for a string with lone surrogates, which no UTF-8 text contains."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise NotTextError(
            f"the text is not valid Unicode: character {error.start} is {text[error.start]!r}, half of a pair",
            remedy="Pass text decoded from UTF-8 without surrogate escapes.",
        ) from None
