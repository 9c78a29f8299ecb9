"""Definitions of tools, and the calls of them in a chat, in OpenAI's form; and options of the chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from octavo.errors import InvalidInputError, InvalidParameterError, UnsupportedParameterError
from octavo.types import FunctionCall, TemplateOptions, Tool, ToolCall
from octavo.validate.limits import DEFAULT_LIMITS, Limits
from octavo.validate.values import at_most, listed, not_unicode, shown, suggestion, wrong

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_FUNCTION_KEYS = ("name", "description", "parameters", "strict")

TEMPLATE_OPTIONS: Mapping[str, type] = {
    "enable_thinking": bool,
    "thinking": bool,
    "preserve_thinking": bool,
    "reasoning_effort": str,
}
"""Variables of chat templates that a caller may set. Others could be `messages` itself, or burn time."""
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")


def validate_tools(tools: object, *, limits: Limits = DEFAULT_LIMITS) -> tuple[Tool, ...]:
    """Clean definitions; () for None. Raises InvalidParameterError naming the place."""
    if tools is None:
        return ()
    values = listed(tools)
    if values is None or isinstance(tools, str | bytes):
        raise wrong("tools", tools, "a list of definitions of functions")
    at_most("tools", len(values), limits.tools, "tools")
    clean = tuple(_tool(f"tools[{place}]", tool) for place, tool in enumerate(values))
    names = [tool["function"]["name"] for tool in clean]
    for name in names:
        if names.count(name) > 1:
            raise wrong("tools", name, "named once")
    size = len(_json("tools", list(clean)).encode())
    at_most("tools", size, limits.tool_bytes, "bytes")
    return clean


def validate_tool_choice(choice: object, names: Collection[str]) -> tuple[bool, str | None]:
    """(whether calls are forced, the one function to call) of "auto", "none", "required" or a named function; None is
    "auto". Raises InvalidParameterError."""
    if choice in (None, "none", "auto"):
        return False, None
    if not names:
        raise _choice_error(UnsupportedParameterError, "is given without tools")
    if choice == "required":
        return True, None
    if not isinstance(choice, Mapping) or choice.get("type") != "function":
        raise _choice_error(UnsupportedParameterError, f"is {shown(choice)}")
    function = choice.get("function")
    if set(choice) != {"type", "function"} or not isinstance(function, Mapping) or set(function) != {"name"}:
        raise _choice_error(InvalidParameterError, "has other fields than a function's name")
    name = function["name"]
    if not isinstance(name, str) or name not in names:
        raise _choice_error(InvalidParameterError, "names a function that tools does not have")
    return True, name


def _choice_error(kind: type[InvalidParameterError], what: str) -> InvalidParameterError:
    return kind(
        f"tool_choice {what}",
        remedy='Use "none", "auto", "required" or {"type": "function", "function": {"name": ...}} of one of the tools.',
        parameter="tool_choice",
    )


def validate_tool_calls(
    where: str, calls: object, *, limits: Limits = DEFAULT_LIMITS
) -> tuple[ToolCall, ...]:
    """The `tool_calls` of an assistant's message. Raises InvalidInputError naming the place."""
    values = listed(calls)
    if values is None or isinstance(calls, str | bytes):
        raise _malformed(where, "tool_calls are no list")
    return tuple(_call(f"{where}, call {place}", call, limits) for place, call in enumerate(values))


def validate_template_options(options: object) -> TemplateOptions:
    """Raises InvalidParameterError for options outside `TEMPLATE_OPTIONS`."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise wrong("chat_template_kwargs", options, "an object")
    for name, value in options.items():
        kind = TEMPLATE_OPTIONS.get(name)
        if kind is None:
            raise InvalidParameterError(
                f"chat_template_kwargs has {shown(name)}, which cannot be set",
                remedy=suggestion(name, list(TEMPLATE_OPTIONS), f"Use {', '.join(TEMPLATE_OPTIONS)}."),
                parameter="chat_template_kwargs",
            )
        if type(value) is not kind or (kind is str and value not in _EFFORTS):
            allowed = "true or false" if kind is bool else ", ".join(_EFFORTS)
            raise wrong(f"chat_template_kwargs.{name}", value, allowed)
    return dict(options)


def _tool(where: str, tool: object) -> Tool:
    if not isinstance(tool, Mapping) or set(tool) - {"type", "function"}:
        raise wrong(where, tool, "an object with type and function")
    if tool.get("type") != "function":
        raise wrong(f"{where}.type", tool.get("type"), "function")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise wrong(f"{where}.function", function, "an object with a name")
    for key in function:
        if key not in _FUNCTION_KEYS:
            raise wrong(f"{where}.function", key, f"one of {', '.join(_FUNCTION_KEYS)}")
    name = function.get("name")
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise wrong(f"{where}.function.name", name, "1 to 64 letters, digits, _, - or .")
    clean: dict[str, Any] = {"name": name}
    if (description := function.get("description")) is not None:
        if not isinstance(description, str) or not_unicode(description) is not None:
            raise wrong(f"{where}.function.description", description, "text")
        clean["description"] = description
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise wrong(f"{where}.function.parameters", parameters, "a JSON schema")
    # Templates and grammars alike read what a function without parameters takes: nothing.
    clean["parameters"] = {"type": "object", "properties": {}} if parameters is None else dict(parameters)
    if function.get("strict") not in (None, True, False):
        raise wrong(f"{where}.function.strict", function["strict"], "true or false")
    return {"type": "function", "function": clean}


def _call(where: str, call: object, limits: Limits) -> ToolCall:
    if not isinstance(call, Mapping) or set(call) - {"id", "type", "function", "index"}:
        raise _malformed(where, "it is no object of id, type and function")
    function, call_id = call.get("function"), call.get("id", "")
    if not isinstance(function, Mapping) or call.get("type", "function") != "function":
        raise _malformed(where, "it calls no function")
    name, arguments = function.get("name"), function.get("arguments", "{}")
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise _malformed(where, f"its name is {shown(name)}")
    if not isinstance(call_id, str) or not_unicode(call_id) is not None or len(call_id) > 256:
        raise _malformed(where, f"its id is {shown(call_id)}")
    if not isinstance(arguments, str) or not_unicode(arguments) is not None:
        raise _malformed(where, "its arguments are no text")
    if len(arguments.encode()) > limits.tool_bytes:
        raise _malformed(where, f"its arguments have more than {limits.tool_bytes} bytes")
    try:
        parsed = json.loads(arguments) if arguments else {}
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise _malformed(where, "its arguments are no JSON object")
    return ToolCall(id=call_id, type="function", function=FunctionCall(name=name, arguments=arguments))


def _json(where: str, value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise wrong(where, value, f"JSON ({error})") from None


def _malformed(where: str, what: str) -> InvalidInputError:
    return InvalidInputError(
        f"{where}: {what}",
        remedy='Give calls as {"id": ..., "type": "function", "function": {"name": ..., "arguments": "{...}"}}.',
    )
