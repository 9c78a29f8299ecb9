"""How a family of models writes a call of a tool in its answer, and how to tell from a chat template.

What a call looks like as text is all that is known here; reading one that is arriving is
`octavo.text.tool_calls`'s work, and writing the definitions of tools is the template's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class ToolSyntax:
    name: Literal["hermes", "llama3", "mistral"]
    begin: str
    """Opens a call, or a list of them. It may be a control token."""
    end: str
    """Closes it; "": the end of the answer."""
    arguments_key: Literal["arguments", "parameters"]
    bare: bool = False
    """An answer that starts with a JSON object is a call without `begin` too."""


HERMES = ToolSyntax("hermes", "<tool_call>", "</tool_call>", "arguments")
"""<tool_call>{"name": ..., "arguments": {...}}</tool_call>, once for each call: Hermes 2 and 3, Qwen 2.5 and 3."""
LLAMA3 = ToolSyntax("llama3", "<|python_tag|>", "", "parameters", bare=True)
"""{"name": ..., "parameters": {...}} as the whole answer, at times after <|python_tag|>: Llama 3.1 to 3.3."""
MISTRAL = ToolSyntax("mistral", "[TOOL_CALLS]", "", "arguments")
"""[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...], or from tokenizer v11 on [TOOL_CALLS]name[ARGS]{...}."""

ARGUMENTS_MARK = "[ARGS]"
CALL_ID_MARK = "[CALL_ID]"
"""Mistral's, between a call's name and its arguments."""


def tool_syntax_of(template: str) -> ToolSyntax | None:
    """The syntax of the calls that a chat template replays; None: it has none that is known here.

    Qwen3-Coder's <function=...> within <tool_call> is another syntax, which is not read.
    """
    if "tool" not in template:
        return None
    if HERMES.begin in template:
        return None if "<function=" in template else HERMES
    if MISTRAL.begin in template:
        return MISTRAL
    if "<|start_header_id|>" in template and '"parameters"' in template:
        return LLAMA3
    return None
