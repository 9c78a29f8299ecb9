"""Tool calls in an answer that is still arriving: text in pieces -> names and arguments in pieces.

Reads what stands between a call's markers (`octavo.text.tool_syntax`); finding the markers is
`octavo.text.answer`'s work. The arguments of a call are passed on as the model writes them. What turns out not
to be a call of an offered tool is handed back as text: nothing is lost, and nothing is called by mistake.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass

from octavo.text.json_extent import JsonExtent
from octavo.text.tool_syntax import ARGUMENTS_MARK, CALL_ID_MARK, ToolSyntax

_STRING = r'"(?:[^"\\]|\\.){0,256}"'
_NAME = r"[\w.-]{1,64}"
_HEAD_CHARACTERS = 1024
"""A call whose name has not come by then is read whole: trying again with each piece would take squared time."""
_SEPARATORS = " \t\r\n,;[]"


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of call number `index`; the first one carries the name."""

    index: int
    name: str | None
    arguments: str
    """JSON text; joined, the whole arguments."""


class ToolCallReader:
    """Reads one section of calls, from behind its opening marker. For one answer, from one thread."""

    def __init__(self, syntax: ToolSyntax, tools: Collection[str], first_index: int) -> None:
        self._syntax = syntax
        self._tools = tools
        self._first_index = first_index
        self._text = ""
        """What was not yet read as part of a call, or told apart from one."""
        self._head = re.compile(
            rf'\{{\s*"name"\s*:\s*(?P<name>{_STRING})\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)'
        )
        self._plain_head = re.compile(
            rf"(?P<name>{_NAME})(?:{re.escape(CALL_ID_MARK)}\w+)?{re.escape(ARGUMENTS_MARK)}\s*(?=\{{)"
        )
        self._object: JsonExtent | None = None
        """Of a call that is not read piece by piece: up to where `_seen` characters of it were followed."""
        self._seen = 0
        self._arguments: JsonExtent | None = None
        """Of the call whose arguments are arriving."""
        self._tail: JsonExtent | None = None
        """Of what follows a call's arguments up to the brace that closes the object around them."""
        self.ended = False
        """The closing marker was read, or the section proved to be no call; `rest` is what follows."""
        self.rest = ""
        self.calls = 0

    def push(self, text: str) -> list[ToolCallDelta]:
        """Read on. After `ended` there is no more to push."""
        self._text += text
        deltas: list[ToolCallDelta] = []
        while not self.ended and self._text and self._step(deltas):
            pass
        return deltas

    def finish(self) -> str:
        """The answer is over: text that was held back and is no call."""
        text, self._text = self._text, ""
        if self._tail is not None or self._arguments is not None or not text.strip(_SEPARATORS):
            return ""
        return text

    def _step(self, deltas: list[ToolCallDelta]) -> bool:
        """Whether anything was read."""
        if self._arguments is not None:
            self._read_arguments(self._arguments, deltas)
        elif self._tail is not None:
            self._read_tail(self._tail)
        else:
            return self._start(deltas)
        return True

    def _read_arguments(self, arguments: JsonExtent, deltas: list[ToolCallDelta]) -> None:
        end = arguments.feed(self._text)
        piece, self._text = self._text[:end], "" if end is None else self._text[end:]
        deltas.append(ToolCallDelta(self.next_index - 1, None, piece))
        if end is not None:
            self._arguments = None

    def _read_tail(self, tail: JsonExtent) -> None:
        end = tail.feed(self._text)
        self._text = "" if end is None else self._text[end:]
        if end is not None:
            self._tail = None

    def _start(self, deltas: list[ToolCallDelta]) -> bool:
        end = self._syntax.end
        stripped = self._text.lstrip(_SEPARATORS)
        if end and stripped.startswith(end):
            self._end(stripped[len(end) :])
            return True
        if not stripped or (end and end.startswith(stripped)):
            return False
        if stripped[0] == "{":
            self._text = stripped
            return self._start_object(deltas)
        if self._syntax.name == "mistral":
            return self._start_named(stripped, deltas)
        self._end(self._text)
        return True

    def _start_object(self, deltas: list[ToolCallDelta]) -> bool:
        found = self._head.match(self._text[:_HEAD_CHARACTERS]) if self._seen < _HEAD_CHARACTERS else None
        if found is not None:
            name = _string(found["name"])
            if name not in self._tools:
                self._end(self._text)
                return True
            self._tail = JsonExtent()
            self._tail.feed("{")
            self._begin(name, found.end(), deltas)
            return True
        self._object = self._object or JsonExtent()
        end = self._object.feed(self._text[self._seen :])
        if end is None:
            self._seen = len(self._text)
            return False
        end += self._seen
        self._object, self._seen = None, 0
        call = _parsed(self._text[:end], self._tools)
        if call is None:
            self._end(self._text)
            return True
        self._text = self._text[end:]
        deltas.append(ToolCallDelta(self.next_index, *call))
        self.calls += 1
        return True

    def _start_named(self, stripped: str, deltas: list[ToolCallDelta]) -> bool:
        found = self._plain_head.match(stripped)
        if found is not None and found["name"] in self._tools:
            self._text = stripped
            self._begin(found["name"], found.end(), deltas)
            return True
        if found is None and _may_become_head(stripped):
            return False
        self._end(self._text)
        return True

    def _begin(self, name: str, head_characters: int, deltas: list[ToolCallDelta]) -> None:
        self._text = self._text[head_characters:]
        self._object, self._seen = None, 0
        self._arguments = JsonExtent()
        deltas.append(ToolCallDelta(self.next_index, name, ""))
        self.calls += 1

    def _end(self, rest: str) -> None:
        self.ended, self.rest, self._text = True, rest, ""

    @property
    def next_index(self) -> int:
        return self._first_index + self.calls


def _may_become_head(text: str) -> bool:
    name, mark, rest = text.partition("[")
    if re.fullmatch(_NAME, name) is None:
        return False
    marks = mark + rest
    if marks.startswith(CALL_ID_MARK):
        _, again, rest = marks[len(CALL_ID_MARK) :].partition("[")
        marks = again + rest
    return (
        ARGUMENTS_MARK.startswith(marks) or CALL_ID_MARK.startswith(marks) or marks.strip() == ARGUMENTS_MARK
    )


def _string(literal: str) -> str:
    try:
        return str(json.loads(literal))
    except ValueError:
        return ""


def _parsed(text: str, tools: Collection[str]) -> tuple[str, str] | None:
    """(name, arguments as JSON text) of a whole call, its keys in any order; None: it is none."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or call.get("name") not in tools:
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):  # encoded twice
        return str(call["name"]), arguments
    return str(call["name"]), json.dumps(arguments, ensure_ascii=False)
