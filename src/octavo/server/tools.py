"""The fields of a chat request that speak of tools and of reasoning -> a plan for its answer, or a refusal by name."""

from __future__ import annotations

from octavo.errors import InvalidGrammarError, InvalidParameterError
from octavo.server.faults import bad_request, unsupported
from octavo.server.models import Resident
from octavo.server.schema import ChatRequest
from octavo.text.answer import AnswerForm
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
