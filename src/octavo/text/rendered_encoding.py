"""Rendered chat -> ids, such that only what the template wrote can become a control token.

As a rule the template wrote every control token in the text, and the text is encoded whole: the ids are those
of transformers' apply_chat_template. If message text spells a control token, or completes one, the template's
own are placed by id and everything between them is encoded by the encoder that cannot produce any.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from octavo.text.provenance import Span, TemplateText
from octavo.text.tokenizer import Tokenizer

_MASK = "\ue000"
"""Stands for message text: a character of private use, part of no token."""

_WORD_OR_SPACE = re.compile(r"\s|\S+")


def encode_rendered(tokenizer: Tokenizer, text: TemplateText) -> tuple[list[int], list[str]]:
    """The ids, and the spellings of the control tokens that message text tried to be.

    Raises NotTextError and InvalidInputError as `Tokenizer.encode_plain` does.
    """
    token_ids, spans = tokenizer.encode_with_offsets(str.__str__(text))
    forged = {
        token_id
        for token_id, span in zip(token_ids, spans, strict=True)
        if token_id in tokenizer.reserved_token_ids and not _is_own(tokenizer, token_id, span, text)
    }
    if not forged:
        return token_ids, []
    return encode_apart(tokenizer, text), [tokenizer.spelling(token_id) for token_id in sorted(forged)]


def encode_apart(tokenizer: Tokenizer, text: TemplateText) -> list[int]:
    """Equal to encoding the text whole where no message text spells a control token."""
    plain = str.__str__(text)
    token_ids: list[int] = []
    position = 0
    for token_id, (start, end) in _own_control_tokens(tokenizer, text):
        run = plain[position:start]
        token_ids += [*tokenizer.encode_plain(run, at_start=position == 0), token_id]
        position = end
    return [*token_ids, *tokenizer.encode_plain(plain[position:], at_start=position == 0)]


def _own_control_tokens(tokenizer: Tokenizer, text: TemplateText) -> Iterator[tuple[int, Span]]:
    """The control tokens the template wrote, found with all message text masked out.

    A word of message text becomes one masking character. Its whitespace stays, for the tokens that swallow the
    whitespace around them.
    """
    plain = str.__str__(text)
    masked: list[str] = []
    origins: list[int] = []
    for start, end, own in _stretches(text):
        if own:
            masked += plain[start:end]
            origins += range(start, end)
        else:
            for found in _WORD_OR_SPACE.finditer(plain, start, end):
                masked.append(found[0] if found[0].isspace() else _MASK)
                origins.append(found.start())
    origins.append(len(plain))
    seen = "".join(masked)
    for token_id, span in zip(*tokenizer.encode_with_offsets(seen), strict=True):
        if token_id in tokenizer.reserved_token_ids:
            spelling = tokenizer.spelling(token_id)
            at = seen.find(spelling, *span)
            if at >= 0 and text.wrote(origins[at], origins[at + len(spelling) - 1] + 1):
                yield token_id, (origins[span[0]], origins[span[1]])


def _is_own(tokenizer: Tokenizer, token_id: int, span: Span, text: TemplateText) -> bool:
    """Whether the template wrote this token; the span may also cover whitespace that it swallowed."""
    spelling = tokenizer.spelling(token_id)
    start = text.find(spelling, *span)
    if start < 0:
        # Not spelled here at all: the id for characters that the vocabulary lacks.
        return token_id == tokenizer.unknown_token_id
    return text.wrote(start, start + len(spelling))


def _stretches(text: TemplateText) -> Iterator[tuple[int, int, bool]]:
    """(start, end, whether the template wrote it), from the start of the text to its end."""
    position = 0
    for start, end in text.spans:
        yield position, start, False
        yield start, end, True
        position = end
    yield position, len(text), False
