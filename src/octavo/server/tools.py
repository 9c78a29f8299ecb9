"""The fields of a chat request that speak of tools and of reasoning -> a plan for its answer, or a refusal by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.errors import InvalidGrammarError, InvalidParameterError
from octavo.server.faults import bad_request, unsupported
from octavo.server.models import Resident
from octavo.server.schema import ChatRequest
from octavo.text.answer import AnswerForm
from octavo.text.chat import ChatTemplate
from octavo.text.tool_use import NO_TOOLS, ToolUse
from octavo.types import TemplateOptions
from octavo.validate import validate_template_options, validate_tools


def tool_use(request: ChatRequest, template: ChatTemplate, model: Resident) -> ToolUse:
    """Raises HttpFault naming tools or tool_choice, and what `validate_tools` raises."""
    tools = validate_tools(request.tools)
    required, only = _choice(request.tool_choice, {tool["function"]["name"] for tool in tools})
    if not tools or request.tool_choice == "none":
        return NO_TOOLS
    if not template.takes_tools:
        raise unsupported(
            "tools", f"the chat template of {model.served.name} does not show them to the model"
        )
    if template.tool_syntax is None:
        raise unsupported("tools", f"how {model.served.name} writes calls of tools is not known here")
    strict = any(tool["function"].get("strict") for tool in request.tools or ())
    if (required or strict) and not model.ready.grammars:
        field = "tool_choice" if required else "tools"
        raise unsupported(field, f"{model.served.name} runs where there are no grammars to force calls with")
    return ToolUse(
        tools=tools,
        required=required,
        only=only,
        several=request.parallel_tool_calls is not False and only is None,
        strict=strict,
    )


def template_options(request: ChatRequest, template: ChatTemplate) -> TemplateOptions:
    """Variables for the template. Raises HttpFault for one that it does not know, and InvalidParameterError."""
    options = dict(validate_template_options(request.chat_template_kwargs))
    for name in options:
        if not template.mentions(name):
            raise unsupported(f"chat_template_kwargs.{name}", "the model's chat template does not know it")
    effort = request.reasoning_effort
    if effort is None:
        return options
    if template.mentions("reasoning_effort"):
        try:
            added = validate_template_options({"reasoning_effort": effort})
        except InvalidParameterError as error:
            raise bad_request(
                str(error).replace("chat_template_kwargs.", ""), param="reasoning_effort"
            ) from None
    elif not template.mentions("enable_thinking"):
        raise unsupported("reasoning_effort", "the model's chat template knows no such thing")
    elif effort != "none":
        raise unsupported("reasoning_effort", 'the model thinks or does not: only "none" is')
    else:
        added = {"enable_thinking": False}
    for name, value in added.items():
        if options.get(name, value) != value:
            raise bad_request(
                f"reasoning_effort and chat_template_kwargs.{name} contradict each other",
                param="reasoning_effort",
            )
    return {**options, **added}


def grammar_fault(error: InvalidGrammarError, form: AnswerForm) -> Exception:
    """Named after the field that the grammar came from: with tools there is no other."""
    return bad_request(str(error), code="invalid_grammar", param="tools") if form.tools else error


def _choice(choice: str | Mapping[str, Any] | None, names: set[str]) -> tuple[bool, str | None]:
    """(whether calls are forced, the one function to call)"""
    if choice in (None, "none", "auto"):
        return False, None
    if not names:
        raise unsupported("tool_choice", "there are no tools to choose")
    if choice == "required":
        return True, None
    if not isinstance(choice, Mapping) or choice.get("type") != "function":
        raise unsupported("tool_choice", 'only "none", "auto", "required" and the name of a function are')
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if set(choice) != {"type", "function"} or not isinstance(function, Mapping) or set(function) != {"name"}:
        raise bad_request(
            'tool_choice must be {"type": "function", "function": {"name": ...}}', param="tool_choice"
        )
    if name not in names:
        raise bad_request("tool_choice names a function that tools does not have", param="tool_choice")
    return True, str(name)
