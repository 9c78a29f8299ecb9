"""Finds the prompt (the argument, a file, or standard input) and puts it in the form the model takes.

Text is UTF-8, and one final newline is dropped.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.errors import ChatTemplateError, UsageError
from octavo.settings import SamplingParams
from octavo.types import Message

if TYPE_CHECKING:
    from octavo.llm import LLM


def read_prompt(argument: str | None, file: Path | None) -> str:
    """`argument` "-", or neither of both with something piped in, means standard input.

    Raises UsageError where both or nothing was given or the file cannot be read, and what `validate_text`
    raises: EmptyPromptError, NotTextError.
    """
    from octavo.validate import validate_text

    if argument is not None and file is not None:
        raise UsageError("both PROMPT and --file were given", remedy="Give one of them.")
    if file is not None:
        return validate_text(_without_newline(read_file(file)))
    if argument is not None and argument != "-":
        # The system hands over what is not UTF-8 as lone surrogates.
        return validate_text(argument.encode("utf-8", "surrogateescape"))
    if argument is None and sys.stdin.isatty():
        raise UsageError(
            "no prompt was given",
            remedy='Give one: octavo generate "PROMPT", --file FILE, --batch FILE.jsonl, or - to read '
            "standard input.",
        )
    return validate_text(_without_newline(sys.stdin.buffer.read()))


def chat_turns(llm: LLM, text: str, *, system: str | None, raw: bool) -> list[Message] | None:
    """The prompt as a chat for an instruct model; None where the model is to continue the text as it is.

    Raises ChatTemplateError for a system message that the model has no template for.
    """
    if raw or (system is None and not llm.has_chat_template):
        return None
    if not llm.has_chat_template:
        raise ChatTemplateError(
            f"{llm.info()['model']} has no chat template, and so no place for a system message",
            remedy="Leave --system out to continue the text, or choose an instruct model.",
        )
    first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": text}]


def bounded(llm: LLM, turns: Sequence[Message], params: SamplingParams) -> SamplingParams:
    """`params` for a chat that answers one prompt: `LLM.chat` would go on for all that is left of the context."""
    from octavo.frontend import DEFAULT_MAX_NEW_TOKENS

    left = llm.context_tokens - llm.count_chat_tokens(turns)
    if params.max_new_tokens is not None or left < 1:
        return params
    return dataclasses.replace(params, max_new_tokens=min(DEFAULT_MAX_NEW_TOKENS, left))


def read_file(path: Path) -> bytes:
    """Raises UsageError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror or error}", remedy="Check the path and its permissions."
        ) from error


def _without_newline(data: bytes) -> bytes:
    return data.removesuffix(b"\r\n") if data.endswith(b"\r\n") else data.removesuffix(b"\n")
