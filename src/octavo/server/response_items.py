"""The output of /v1/responses as it grows: reasoning, messages and calls of functions, each an item with its events.

An item is open while deltas of its kind come. Numbering events and sending them is the route's work.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from octavo.text.answer import AnswerDelta

Event = tuple[str, dict[str, Any]]
"""(type without "response.", fields)"""

_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}


@dataclass(slots=True)
class Item:
    kind: Literal["message", "reasoning", "function_call"]
    id: str
    place: int
    name: str = ""
    call_id: str = ""
    call_index: int = -1
    text: str = ""
    """Or the arguments."""
    status: Literal["in_progress", "completed", "incomplete"] = "in_progress"

    def json(self) -> dict[str, Any]:
        head = {"id": self.id, "type": self.kind, "status": self.status}
        if self.kind == "function_call":
            return {**head, "call_id": self.call_id, "name": self.name, "arguments": self.text}
        content = [] if self.status == "in_progress" else [self.part()]
        if self.kind == "reasoning":
            return {**head, "summary": [], "content": content}
        return {**head, "role": "assistant", "content": content}

    def part(self) -> dict[str, Any]:
        part = {"type": _PARTS[self.kind], "text": self.text}
        return part if self.kind == "reasoning" else {**part, "annotations": [], "logprobs": []}

    def at(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.place}


class Items:
    """Of one answer. What methods return are the events to send, in order."""

    def __init__(self) -> None:
        self.items: list[Item] = []

    def take(self, deltas: Iterable[AnswerDelta]) -> list[Event]:
        events: list[Event] = []
        for delta in deltas:
            if (call := delta.tool_call) is not None:
                item = self._item("function_call", events, name=call.name or "", call_index=call.index)
                self._add(item, call.arguments, events)
            elif delta.reasoning:
                self._add(self._item("reasoning", events), delta.reasoning, events)
            elif delta.content:
                self._add(self._item("message", events), delta.content, events)
        return events

    def finish(self, *, complete: bool) -> list[Event]:
        """The answer is over. One without any text has an empty message."""
        events: list[Event] = []
        if not self.items:
            self._item("message", events)
        return events + self._close("completed" if complete else "incomplete")

    def _item(
        self,
        kind: Literal["message", "reasoning", "function_call"],
        events: list[Event],
        *,
        name: str = "",
        call_index: int = -1,
    ) -> Item:
        """The open one if it is of this kind, else a new one."""
        if self.items and (self.items[-1].kind, self.items[-1].call_index) == (kind, call_index):
            return self.items[-1]
        events += self._close("completed")
        item = Item(
            kind, f"{_PREFIXES[kind]}_{secrets.token_hex(12)}", len(self.items), name, call_index=call_index
        )
        if kind == "function_call":
            item.call_id = f"call_{secrets.token_hex(12)}"
        self.items.append(item)
        events.append(("output_item.added", {"output_index": item.place, "item": item.json()}))
        if kind in _PARTS:
            events.append(("content_part.added", {**item.at(), "content_index": 0, "part": item.part()}))
        return item

    def _add(self, item: Item, text: str, events: list[Event]) -> None:
        if not text:
            return
        item.text += text
        if item.kind == "function_call":
            events.append(("function_call_arguments.delta", {**item.at(), "delta": text}))
        elif item.kind == "reasoning":
            events.append(("reasoning_text.delta", {**item.at(), "content_index": 0, "delta": text}))
        else:
            fields = {**item.at(), "content_index": 0, "delta": text, "logprobs": []}
            events.append(("output_text.delta", fields))

    def _close(self, status: Literal["completed", "incomplete"]) -> list[Event]:
        if not self.items or self.items[-1].status != "in_progress":
            return []
        item = self.items[-1]
        item.status = status
        events: list[Event] = []
        if item.kind == "function_call":
            fields = {**item.at(), "name": item.name, "arguments": item.text}
            events.append(("function_call_arguments.done", fields))
        else:
            place = {**item.at(), "content_index": 0}
            if item.kind == "reasoning":
                events.append(("reasoning_text.done", {**place, "text": item.text}))
            else:
                events.append(("output_text.done", {**place, "text": item.text, "logprobs": []}))
            events.append(("content_part.done", {**place, "part": item.part()}))
        events.append(("output_item.done", {"output_index": item.place, "item": item.json()}))
        return events
