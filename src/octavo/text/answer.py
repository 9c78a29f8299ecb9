"""The parts of an answer that is still arriving: reasoning, content, and calls of tools.

The law: the parts, joined, do not depend on how the text was cut. Held back is only what may still become a
marker, and white space that a marker would swallow.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from octavo.text.tool_calls import ToolCallDelta, ToolCallReader
from octavo.text.tool_syntax import ToolSyntax
from octavo.types import FunctionCall, ToolCall

REASONING_BEGIN, REASONING_END = "<think>", "</think>"
"""As written by every family that thinks in the open: Qwen 3, DeepSeek R1, SmolLM 3."""


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """New text of one part."""

    content: str = ""
    reasoning: str = ""
    tool_call: ToolCallDelta | None = None


@dataclass(slots=True)
class Said:
    """The parts of an answer as they have come so far."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, list[str]]] = field(default_factory=list)
    """(name, pieces of the arguments)"""

    def take(self, deltas: Iterable[AnswerDelta]) -> None:
        for delta in deltas:
            self.content += delta.content
            self.reasoning += delta.reasoning
            if (call := delta.tool_call) is not None:
                if call.name is not None:
                    self.calls.append((call.name, []))
                self.calls[call.index][1].append(call.arguments)

    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls in OpenAI's form, each under a new id."""
        return tuple(
            ToolCall(
                id=new_call_id(),
                type="function",
                function=FunctionCall(name=name, arguments="".join(arguments)),
            )
            for name, arguments in self.calls
        )


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What an answer may be made of. Its text is to come with the control tokens `shown` spelled out."""

    syntax: ToolSyntax | None = None
    tools: frozenset[str] = frozenset()
    """Names that may be called; none where calls are not looked for."""
    single_call: bool = False
    thinks: bool = False
    thinking: bool = False
    shown: Mapping[str, int] = field(default_factory=dict)
    """Markers that are control tokens of the vocabulary: spelling -> id."""

    def parser(self) -> AnswerParser:
        """For one answer."""
        return AnswerParser(
            syntax=self.syntax,
            tools=self.tools,
            single_call=self.single_call,
            thinks=self.thinks,
            thinking=self.thinking,
            hidden=tuple(self.shown),
        )

    def read(self, text: str) -> Said:
        """The parts of a whole answer."""
        parser, said = self.parser(), Said()
        said.take([*parser.push(text), *parser.finish()])
        return said


class AnswerParser:
    """For one answer, from one thread.

    `syntax` and `tools` (names that may be called): None, or no names, where calls are not looked for.
    `single_call`: calls after the first, and all that follows them, are dropped.
    `thinks`: a leading <think> block is reasoning. `thinking`: the prompt has already opened it.
    `hidden`: control tokens that the text spells out; where they mark nothing they are left out of the content.
    """

    def __init__(
        self,
        *,
        syntax: ToolSyntax | None = None,
        tools: Collection[str] = (),
        single_call: bool = False,
        thinks: bool = False,
        thinking: bool = False,
        hidden: Collection[str] = (),
    ) -> None:
        self._syntax = syntax if tools else None
        self._tools = tools
        self._single_call = single_call
        self._hidden = hidden
        begin = () if self._syntax is None else (self._syntax.begin,)
        self._strays = tuple(marker for marker in hidden if marker not in begin)
        self._markers = (*self._strays, *begin)
        """What no content may be cut within."""
        self._thinks = thinks and not thinking
        self._reasoning = thinking
        self._trim = thinking
        """White space is dropped up to the first character of the part: it belongs to the marker before."""
        self._first = True
        """Nothing was given out but reasoning: a <think> block, or a call without a marker, may start here."""
        self._held = ""
        self._calls: ToolCallReader | None = None
        self._opening = ""
        """The marker that opened the calls being read, with the white space before it."""
        self._next_index = 0
        self._over = False
        """A call was dropped, and with it the rest of the answer."""

    @property
    def called(self) -> bool:
        """Whether a tool was called: then the answer's finish_reason is tool_calls."""
        return self._next_index > 0 or (self._calls is not None and self._calls.calls > 0)

    def push(self, text: str) -> list[AnswerDelta]:
        self._held += text
        return self._wanted(self._advance(last=False))

    def finish(self) -> list[AnswerDelta]:
        """The answer is over: what was held back."""
        deltas = self._advance(last=True)
        if self._calls is not None:
            rest = self._calls.finish()
            if rest and not self._calls.calls:
                rest = self._opening + rest
            self._leave_calls()
            self._give(deltas, self._without_hidden(rest))
        return self._wanted(deltas)

    def _wanted(self, deltas: list[AnswerDelta]) -> list[AnswerDelta]:
        if not self._single_call:
            return deltas
        kept = []
        for delta in deltas:
            self._over = self._over or (delta.tool_call is not None and delta.tool_call.index > 0)
            if not self._over:
                kept.append(delta)
        return kept

    def _advance(self, *, last: bool) -> list[AnswerDelta]:
        deltas: list[AnswerDelta] = []
        while self._held:
            if self._calls is not None:
                self._read_calls(self._calls, deltas)
            elif self._reasoning:
                if not self._read_reasoning(deltas, last):
                    break
            elif not self._read_content(deltas, last):
                break
        return deltas

    def _read_calls(self, calls: ToolCallReader, deltas: list[AnswerDelta]) -> None:
        text, self._held = self._held, ""
        deltas += [AnswerDelta(tool_call=delta) for delta in calls.push(text)]
        if calls.ended:
            self._held = calls.rest
            self._trim = calls.calls > 0
            if not calls.calls and self._opening:
                self._give(deltas, self._without_hidden(self._opening))
            self._leave_calls()

    def _leave_calls(self) -> None:
        assert self._calls is not None
        self._next_index = self._calls.next_index
        self._calls = None

    def _read_reasoning(self, deltas: list[AnswerDelta], last: bool) -> bool:
        """Whether to go on."""
        text = self._held.lstrip() if self._trim else self._held
        before, found, after = text.partition(REASONING_END)
        if found:
            piece, self._held = before.rstrip(), after
            self._reasoning, self._trim = False, True
        else:
            end = len(text) if last else len(text) - _held_back(text, REASONING_END)
            piece = text[:end].rstrip() if not last else text
            self._held = text[len(piece) :]
            self._trim = self._trim and not piece
        if piece:
            deltas.append(AnswerDelta(reasoning=piece))
        return bool(found)

    def _read_content(self, deltas: list[AnswerDelta], last: bool) -> bool:
        """Whether to go on."""
        text = self._held = self._held.lstrip() if self._trim else self._held
        start = text.lstrip()
        if self._first and self._thinks:
            if start.startswith(REASONING_BEGIN):
                self._reasoning = self._trim = True
                self._thinks = False
                self._held = start[len(REASONING_BEGIN) :]
                return True
            if not last and REASONING_BEGIN.startswith(start):
                return False
        syntax = self._syntax
        if syntax is not None and syntax.bare and self._first and start.startswith("{"):
            self._start_calls(start, "")
            return True
        before, found, after = (text, "", "") if syntax is None else text.partition(syntax.begin)
        stray = min(self._strays, key=lambda marker: _place(before, marker), default="")
        if stray and stray in before:
            self._held = text.replace(stray, "", 1)
            return True
        if found and syntax is not None:
            content = before.rstrip()
            self._give(deltas, content)
            self._start_calls(after, before[len(content) :] + syntax.begin)
            return True
        piece = text
        if not last and self._markers:
            piece = text[: len(text) - max(_held_back(text, marker) for marker in self._markers)]
            if syntax is not None:  # white space before a marker goes with it
                piece = piece.rstrip()
        self._held = text[len(piece) :]
        self._give(deltas, piece)
        return False

    def _without_hidden(self, text: str) -> str:
        for marker in self._hidden:
            text = text.replace(marker, "")
        return text

    def _give(self, deltas: list[AnswerDelta], content: str) -> None:
        if content:
            deltas.append(AnswerDelta(content=content))
            self._first = self._trim = False

    def _start_calls(self, text: str, opening: str) -> None:
        assert self._syntax is not None
        self._calls = ToolCallReader(self._syntax, self._tools, self._next_index)
        self._held, self._opening, self._first = text, opening, False


def _place(text: str, marker: str) -> int:
    place = text.find(marker)
    return len(text) if place < 0 else place


def _held_back(text: str, marker: str) -> int:
    """Length of the longest end of `text` that may be the start of the marker."""
    longest = min(len(text), len(marker) - 1)
    return next((n for n in range(longest, 0, -1) if marker.startswith(text[len(text) - n :])), 0)
