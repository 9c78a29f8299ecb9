"""Where a JSON value ends in text that is still arriving. Finds the end; does not judge what lies before it."""

from __future__ import annotations


class JsonExtent:
    """Follows one value from its first character on. Fed text in pieces, it answers the same however it is cut."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._started = False
        self._literal = False

    def feed(self, text: str) -> int | None:
        """How many characters of `text` still belong to the value, once it ends within it; None: all, so far.

        A number or a word ends before the first character that cannot belong to it.
        """
        for at, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
                    if self._depth == 0:
                        return at + 1
            elif self._literal:
                if character in ",]} \t\r\n":
                    return at
            elif character == '"':
                self._in_string = self._started = True
            elif character in "{[":
                self._depth += 1
                self._started = True
            elif character in "}]":
                if self._depth == 0:
                    return at
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
            elif not self._started and not character.isspace():
                self._literal = self._started = True
        return None
