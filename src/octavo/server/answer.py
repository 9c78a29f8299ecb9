"""From an answer's text to what a client gets of it: content, reasoning, tool calls. The seam for parsers.

A route pushes text as it comes and sends on whatever a parser makes of it; `PlainAnswer` is for models and
requests without reasoning and tools.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of one tool call. `id` and `name` come with the first piece, `arguments` is JSON text as it grows."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Delta:
    """What some text was; joined, `content` is the message's content."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not (self.content or self.reasoning or self.tool_calls)


class AnswerParser(Protocol):
    """For one sequence."""

    def push(self, text: str) -> Delta:
        """What is certain of the text so far and was not told yet."""

    def finish(self) -> Delta:
        """The rest; the text is over."""

    @property
    def called_tools(self) -> bool:
        """Whether a whole tool call was found: finish_reason is then tool_calls."""


class PlainAnswer:
    """Text is content."""

    called_tools = False

    def push(self, text: str) -> Delta:
        return Delta(content=text)

    def finish(self) -> Delta:
        return Delta()
