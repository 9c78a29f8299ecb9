"""Tokens and their logprobs as the API shows them: a spelling, its bytes, and for each the alternatives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from octavo.text.answer import REASONING_BEGIN, REASONING_END, AnswerForm
from octavo.text.detokenizer import Detokenizer
from octavo.text.tokenizer import Tokenizer
from octavo.types import TokenLogprob

_LEAST = -9999.0
"""What stands for the logarithm of zero, which JSON cannot say; OpenAI's value."""


class TokenNames:
    """Spellings of one model's tokens. Without a tokenizer a token is named by its id."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def bytes_of(self, token_id: int) -> bytes:
        if self._tokenizer is None:
            return f"token_id:{token_id}".encode()
        return self._tokenizer.token_bytes(token_id, first=False, keep_special=True) or b""

    def spelling(self, token_id: int) -> str:
        return self.bytes_of(token_id).decode("utf-8", "replace")

    def unique(self, token_id: int) -> str:
        """A spelling that no other token has: parts of characters as bytes, as OpenAI's completions do."""
        raw = self.bytes_of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def reasoning_tokens(tokenizer: Tokenizer, form: AnswerForm, token_ids: Iterable[int]) -> int:
    """How many of an answer's tokens are reasoning, its markers among them."""
    if not form.thinks:
        return 0
    pieces = Detokenizer(tokenizer, shown=frozenset(form.shown.values()))
    begun, text, count = form.thinking, "", 0
    for count, token_id in enumerate(token_ids, 1):
        text += pieces.push(token_id)
        if not begun:
            begun = text.lstrip().startswith(REASONING_BEGIN)
            if not begun and not REASONING_BEGIN.startswith(text.lstrip()):
                return 0
        if REASONING_END in text:
            return count
        if begun:
            text = text[-len(REASONING_END) :]
    return count if begun else 0


def chat_logprobs(names: TokenNames, logprobs: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """The entries of choices[].logprobs.content."""
    return [
        {
            **_entry(names, each.token_id, each.logprob),
            "top_logprobs": [_entry(names, token_id, value) for token_id, value in each.top],
        }
        for each in logprobs
    ]


def _entry(names: TokenNames, token_id: int, logprob: float) -> dict[str, Any]:
    raw = names.bytes_of(token_id)
    return {"token": raw.decode("utf-8", "replace"), "logprob": bounded(logprob), "bytes": list(raw)}


def completion_logprobs(
    names: TokenNames, logprobs: Sequence[TokenLogprob | None], first_ids: Sequence[int], offset: int
) -> tuple[dict[str, Any], int]:
    """choices[].logprobs of /v1/completions, and the text offset after the last token.

    An entry that is None is the first prompt token, which has no logprob; `first_ids` names it.
    """
    tokens, values, tops, offsets = [], [], [], []
    for place, each in enumerate(logprobs):
        token_id = first_ids[place] if each is None else each.token_id
        name = names.unique(token_id)
        tokens.append(name)
        offsets.append(offset)
        offset += len(names.spelling(token_id))
        values.append(None if each is None else bounded(each.logprob))
        tops.append(None if each is None else _top(names, each))
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}, offset


def _top(names: TokenNames, each: TokenLogprob) -> dict[str, float]:
    """The alternatives, and the token itself where it is none of them."""
    found = {names.unique(token_id): bounded(value) for token_id, value in each.top}
    found.setdefault(names.unique(each.token_id), bounded(each.logprob))
    return found


def bounded(logprob: float) -> float:
    return max(logprob, _LEAST)
