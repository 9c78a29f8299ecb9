"""The fields of a chat request that speak of tools and of reasoning -> a plan for its answer, or a refusal by name."""

from __future__ import annotations

from octavo.errors import InvalidGrammarError, InvalidParameterError
from octavo.server.faults import bad_request, unsupported
from octavo.server.models import Resident
from octavo.server.schema import ChatRequest
from octavo.text.chat import ChatTemplate
from octavo.text.tool_use import ToolUse
from octavo.types import TemplateOptions
from octavo.validate import validate_template_options


def tool_use(request: ChatRequest, model: Resident) -> ToolUse:
    """Raises what `octavo.frontend.Frontend.tool_use` raises."""
    return model.frontend.tool_use(
        request.tools,
        request.tool_choice,
        several=request.parallel_tool_calls is not False,
        grammars=model.ready.grammars,
    )


def reasoning_tokens(request: ChatRequest, model: Resident) -> int | None:
    """The budget of reasoning. Raises HttpFault naming the field."""
    budget, also = (
        request.reasoning_budget,
        None if request.reasoning is None else request.reasoning.max_tokens,
    )
    if budget is not None and also is not None and budget != also:
        raise bad_request(
            "reasoning_budget and reasoning.max_tokens differ: give one", param="reasoning_budget"
        )
    field = "reasoning_budget" if budget is not None else "reasoning.max_tokens"
    tokens = also if budget is None else budget
    if tokens is None:
        return None
    if not 0 <= tokens < 1 << 31:
        raise bad_request(f"{field} is a number of tokens, from 0", param=field)
    template = model.frontend.template
    if template is None or not template.thinks:
        raise unsupported(field, f"{model.served.name} does not think before it answers")
    if not model.ready.grammars:
        raise unsupported(field, f"{model.served.name} runs where nothing can be forced")
    return tokens


def template_options(request: ChatRequest, template: ChatTemplate) -> TemplateOptions:
    """Variables for the template. Raises HttpFault for one that it does not know, and InvalidParameterError."""
    options = dict(validate_template_options(request.chat_template_kwargs))
    for name in options:
        if not template.mentions(name):
            raise unsupported(f"chat_template_kwargs.{name}", "the model's chat template does not know it")
    effort = _effort(request)
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


def _effort(request: ChatRequest) -> str | None:
    effort, also = request.reasoning_effort, None if request.reasoning is None else request.reasoning.effort
    if effort is not None and also is not None and effort != also:
        raise bad_request("reasoning_effort and reasoning.effort differ: give one", param="reasoning_effort")
    return also if effort is None else effort


def grammar_fault(error: InvalidGrammarError, *, of_tools: bool) -> Exception:
    """Named after the field that the grammar came from: with tools there is no other."""
    return bad_request(str(error), code="invalid_grammar", param="tools") if of_tools else error
