"""What is generated from: text, token ids, chat messages, and how much room they leave in the context."""

from __future__ import annotations

import codecs
import numbers
from collections.abc import Mapping

from octavo.errors import ContextLengthError, EmptyPromptError, InvalidInputError, NotTextError
from octavo.types import Message
from octavo.validate.limits import DEFAULT_LIMITS, Limits
from octavo.validate.tools import validate_tool_calls
from octavo.validate.values import either, integer, listed, not_unicode, shown, suggestion

ROLES = ("system", "developer", "user", "assistant", "tool")
_KEYS: Mapping[str, tuple[str, ...]] = {
    "assistant": ("role", "content", "reasoning_content", "tool_calls"),
    "tool": ("role", "content", "tool_call_id", "name"),
}
"""Keys a message of a role may have; others have role and content."""


def split_prompts(prompts: object, *, limits: Limits = DEFAULT_LIMITS) -> tuple[tuple[object, ...], bool]:
    """(prompts, whether a list of them was given). A string, bytes or a list of integers is one prompt.

    The prompts themselves are not looked into. Raises EmptyPromptError for an empty list, which could be
    either, and InvalidInputError.
    """
    if isinstance(prompts, (str, bytes)):
        return (prompts,), False
    values = listed(prompts)
    if values is None:
        raise InvalidInputError(
            f"a prompt cannot be {shown(prompts)}",
            remedy="Give a string, a list of token ids, or a list of such prompts.",
        )
    if not values:
        raise EmptyPromptError("the list of prompts is empty", remedy="Give at least one prompt.")
    if isinstance(values[0], numbers.Number):
        return (prompts,), False
    if len(values) > limits.prompts:
        raise InvalidInputError(
            f"{len(values)} prompts in one call; at most {limits.prompts} are taken",
            remedy="Give them in several calls.",
        )
    return tuple(values), True


def validate_text(prompt: object, *, limits: Limits = DEFAULT_LIMITS) -> str:
    """Text, from str or UTF-8 bytes (a byte order mark is dropped), otherwise unchanged.

    Raises InvalidInputError for another type or too many bytes, EmptyPromptError, and NotTextError with the
    offset of the first bad byte, or of half a surrogate pair.
    """
    if isinstance(prompt, bytes):
        prompt = _decoded(prompt, limits)
    if not isinstance(prompt, str):
        raise InvalidInputError(
            f"a prompt cannot be {shown(prompt)}",
            remedy="Give a string, UTF-8 bytes, or a list of token ids.",
        )
    _require_unicode("the prompt", prompt)
    _require_size("the prompt", prompt, limits)
    if not prompt:
        raise EmptyPromptError("the prompt is empty", remedy="Give some text.")
    return prompt


def validate_prompt_ids(
    ids: object, *, vocab_size: int, context_tokens: int, max_new_tokens: int | None
) -> tuple[int, ...]:
    """Token ids of one prompt, as plain ints, with room for the answer.

    `ids` is a sequence, a one-dimensional array or tensor. `max_new_tokens` as in `resolve_max_new_tokens`, or
    0 where nothing is generated. Raises EmptyPromptError, InvalidInputError naming the position of a bad id,
    and ContextLengthError with both numbers.
    """
    values = None if isinstance(ids, (str, bytes, bytearray)) else listed(ids)
    if values is None:
        raise InvalidInputError(
            f"a prompt of token ids cannot be {shown(ids)}", remedy="Give a list of whole numbers."
        )
    if not values:
        raise EmptyPromptError("the prompt has no tokens", remedy="Give at least one token id.")
    if max_new_tokens == 0:
        _require_length(len(values), context_tokens)
    else:
        resolve_max_new_tokens(
            max_new_tokens, default=None, prompt_tokens=len(values), context_tokens=context_tokens
        )
    clean = []
    for position, value in enumerate(values):
        token_id = integer(value)
        if token_id is None or not 0 <= token_id < vocab_size:
            raise InvalidInputError(
                f"prompt token {position} is {shown(value)}; token ids are whole numbers from 0 to {vocab_size - 1}",
                remedy="Tokenize the prompt with this model's own tokenizer.",
            )
        clean.append(token_id)
    return tuple(clean)


def resolve_max_new_tokens(
    max_new_tokens: int | None, *, default: int | None, prompt_tokens: int, context_tokens: int
) -> int:
    """How many tokens to generate: as asked if they fit, else `default`, or less where less is left.

    `default` None: all that is left. Raises ContextLengthError with both numbers where the prompt leaves no
    room, or what was asked for does not fit.
    """
    _require_length(prompt_tokens, context_tokens)
    left = context_tokens - prompt_tokens
    if left == 0:
        raise ContextLengthError(
            f"the prompt's {prompt_tokens} tokens fill the context of {context_tokens} and leave no room for an answer",
            remedy="Shorten the prompt, or raise --context.",
            prompt_tokens=prompt_tokens,
            context_tokens=context_tokens,
        )
    if max_new_tokens is None:
        return left if default is None else min(default, left)
    if max_new_tokens > left:
        raise ContextLengthError(
            f"the prompt's {prompt_tokens} tokens and max_new_tokens {max_new_tokens} make "
            f"{prompt_tokens + max_new_tokens}; the context is {context_tokens}",
            remedy=f"Use max_new_tokens {left} or less, shorten the prompt, or raise --context.",
            prompt_tokens=prompt_tokens,
            context_tokens=context_tokens,
        )
    return max_new_tokens


def validate_messages(messages: object, *, limits: Limits = DEFAULT_LIMITS) -> tuple[Message, ...]:
    """The turns of a chat: mappings with `role` and `content` (text), and in OpenAI's form what an assistant called
    (`tool_calls`, with the content then empty or None) and which call a tool's answer is for (`tool_call_id`).

    Which roles may follow each other is the chat template's business. Raises EmptyPromptError where there is no
    message or the last one is empty, NotTextError, and InvalidInputError naming the message by its place.
    """
    if not isinstance(messages, (list, tuple)):
        raise InvalidInputError(
            f"messages cannot be {shown(messages)}",
            remedy='Give a list such as [{"role": "user", "content": "Hello"}].',
        )
    if len(messages) > limits.messages:
        raise InvalidInputError(
            f"{len(messages)} messages; at most {limits.messages} are taken", remedy="Leave out the oldest."
        )
    clean = tuple(_message(f"message {place}", message, limits) for place, message in enumerate(messages))
    if not clean or not (clean[-1]["content"] or clean[-1]["role"] == "tool"):
        what = "the last message is empty" if clean else "there are no messages"
        raise EmptyPromptError(what, remedy="Give a last message with some text.")
    total = sum(
        len(text.encode())
        for message in clean
        for key, text in message.items()
        if key != "role" and isinstance(text, str)
    )
    if total > limits.text_bytes:
        raise _too_large("the messages", total, limits)
    return clean


def _message(where: str, message: object, limits: Limits) -> Message:
    if not isinstance(message, Mapping):
        raise InvalidInputError(
            f"{where} is {shown(message)}, not a mapping", remedy="Give role and content for each message."
        )
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidInputError(
            f"{where} has the role {shown(role)}", remedy=suggestion(role, ROLES, f"Use {either(ROLES)}.")
        )
    keys = _KEYS.get(role, ("role", "content"))
    for key in message:
        if key not in keys:
            raise InvalidInputError(
                f"{where} has the key {shown(key)}, which is not supported for the role {role}",
                remedy=f"Give {either(keys)} only.",
            )
    clean = Message(role=role, content="")
    calls = message.get("tool_calls")
    if calls is not None:
        clean["tool_calls"] = validate_tool_calls(where, calls, limits=limits)
        content = "" if content is None else content
    if not isinstance(content, str):
        raise InvalidInputError(
            f"{where} has the content {shown(content)}, not a string", remedy="Give its text as a string."
        )
    clean["content"] = content
    for key in ("reasoning_content", "tool_call_id", "name"):
        text = message.get(key)
        if text is not None:
            if not isinstance(text, str):
                raise InvalidInputError(
                    f"{where} has the {key} {shown(text)}, not a string", remedy="Give its text as a string."
                )
            clean[key] = text  # type: ignore[literal-required]
            _require_unicode(where, text)
            _require_size(where, text, limits)
    _require_unicode(where, content)
    _require_size(where, content, limits)
    return clean


def _decoded(data: bytes, limits: Limits) -> str:
    if len(data) > limits.text_bytes:
        raise _too_large("the prompt", len(data), limits)
    mark = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        return data[mark:].decode()
    except UnicodeDecodeError as error:
        raise NotTextError(
            f"the prompt is not UTF-8 text: byte {data[mark + error.start]:#04x} at offset {mark + error.start}",
            remedy="Convert it to UTF-8, for example with iconv.",
        ) from error


def _require_unicode(where: str, text: str) -> None:
    if (offset := not_unicode(text)) is not None:
        raise NotTextError(
            f"{where} is not Unicode text: character {offset} is half a surrogate pair",
            remedy="Decode the text as UTF-8, without surrogateescape.",
        )


def _require_size(where: str, text: str, limits: Limits) -> None:
    size = len(text.encode())
    if size > limits.text_bytes:
        raise _too_large(where, size, limits)


def _too_large(where: str, size: int, limits: Limits) -> InvalidInputError:
    return InvalidInputError(
        f"{where} has {size} bytes; at most {limits.text_bytes} are taken", remedy="Shorten the text."
    )


def _require_length(prompt_tokens: int, context_tokens: int) -> None:
    if prompt_tokens > context_tokens:
        raise ContextLengthError(
            f"the prompt has {prompt_tokens} tokens, the context {context_tokens}",
            remedy="Shorten the prompt, or raise --context as far as the model and the memory allow.",
            prompt_tokens=prompt_tokens,
            context_tokens=context_tokens,
        )
