"""From what a user said to requests: tokenizer, chat template, the model's defaults and the one validator.

`LLM` has one beside its engine; a server's front process has one without any engine. Reads no weight and
imports no torch. What comes back from the engine is `octavo.generation`'s.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal

from octavo.errors import (
    ChatTemplateError,
    IncompatibleModelError,
    InvalidGrammarError,
    InvalidParameterError,
    UnsupportedParameterError,
)
from octavo.generation import Generation
from octavo.output_filter import OutputFilter
from octavo.settings import SamplingParams
from octavo.text.answer import AnswerForm
from octavo.text.chat import ChatTemplate, RenderedPrompt
from octavo.text.grammar import Grammars
from octavo.text.stop_tokens import stop_token_ids
from octavo.text.template_rendering import LocalRenderer, MakeRenderer
from octavo.text.tokenizer import Tokenizer, load_tokenizer
from octavo.text.tool_use import NO_TOOLS, ToolUse, answer_form, can_hold, grammar_of_calls
from octavo.types import Grammar, Message, ModelSource, Request, Sampling, TemplateOptions, Tool
from octavo.validate import (
    read_sampling_defaults,
    resolve_grammar,
    resolve_max_new_tokens,
    resolve_sampling,
    validate_messages,
    validate_prompt_ids,
    validate_sampling_params,
    validate_text,
    validate_tool_choice,
    validate_tools,
)
from octavo.validate.values import listed

_NOT_HELD = "arguments of calls may miss their schemas: {}"

DEFAULT_MAX_NEW_TOKENS = 256
"""For a raw prompt; a chat takes what is left of the context."""


class Frontend:
    """Thread-safe: nothing changes after construction.

    `vocab_size` is the width of the model's logits, `context_tokens` the longest sequence that was planned.
    `output_filter` sees the text of every answer first. `make_renderer` and `check_grammar` (raises
    InvalidGrammarError) stand in for this process's own, where what a stranger wrote is better run elsewhere.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        vocab_size: int,
        context_tokens: int,
        output_filter: OutputFilter | None = None,
        make_renderer: MakeRenderer = LocalRenderer,
        check_grammar: Callable[[Grammar], None] | None = None,
    ) -> None:
        self.output_filter = output_filter
        self.vocab_size = vocab_size
        self.context_tokens = context_tokens
        self._location = source.location
        self.tokenizer: Tokenizer | None = None
        """None for a folder without one: token ids still work."""
        if source.tokenizer is not None:
            self.tokenizer = load_tokenizer(source.tokenizer, model_vocab_size=vocab_size)
        self.template: ChatTemplate | None = None
        if source.chat_template is not None and self.tokenizer is not None:
            self.template = ChatTemplate(source.chat_template, self.tokenizer, make_renderer=make_renderer)
        self.stop_token_ids = stop_token_ids(
            source.config, source.generation_config, self.tokenizer, self.template
        )
        """The model's own."""
        self.grammars: Grammars | None = None
        if self.tokenizer is not None:
            self.grammars = Grammars(self.tokenizer, vocab_size=vocab_size, end_token_ids=self.stop_token_ids)
            self._check_grammar = check_grammar or self.grammars.check
        self._defaults = read_sampling_defaults(source.generation_config)
        about_text = () if self.tokenizer is None else self.tokenizer.notices
        self.notices: tuple[str, ...] = (*about_text, *self._defaults.notices)
        """What the user should know of the tokenizer and of the model's defaults."""

    def check_params(self, params: SamplingParams | None) -> SamplingParams:
        """Raises InvalidParameterError."""
        return validate_sampling_params(params or SamplingParams(), vocab_size=self.vocab_size)

    def raw(self, prompt: object, params: SamplingParams) -> Generation:
        """A raw continuation of text, or of token ids taken as they are: the first of `params.n` choices
        (`Generation.of_choices`). `params` are checked."""
        request = self._request(self.prompt_ids(prompt), params, DEFAULT_MAX_NEW_TOKENS)
        self._check(request.grammar)
        return Generation(
            request, self.tokenizer, params.stop, continuation=True, output_filter=self.output_filter
        )

    def chat(self, messages: Sequence[Message], params: SamplingParams) -> Generation:
        """The answer to a conversation, in the model's template: the first of `params.n` choices. `params` are
        checked."""
        rendered = self.render(messages)
        request = self._request(rendered.token_ids, params, None)
        self._check(request.grammar)
        # A grammar describes the text from its first byte, so no space before it may be left out.
        exact = request.grammar is not None
        return Generation(
            request,
            self.tokenizer,
            params.stop,
            continuation=exact,
            notices=rendered.notices,
            output_filter=self.output_filter,
        )

    def answer(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        *,
        use: ToolUse = NO_TOOLS,
        options: TemplateOptions = MappingProxyType({}),
        reasoning_tokens: int | None = None,
    ) -> tuple[Generation, AnswerForm]:
        """As `chat`, for who reads reasoning, content and calls of tools apart: with the form's parser.

        The generation's text has the markers between these parts spelled out. A grammar of `params` holds for what
        follows the reasoning, which is closed once it has `reasoning_tokens` tokens. Raises InvalidParameterError for
        a grammar together with tools, for strict tools whose calls could not be told from text, and for
        `reasoning_tokens` of a model that does not think.
        """
        tokenizer = self.require_tokenizer()
        rendered = self.render(messages, tools=use.tools, options=options)
        assert self.template is not None
        form = answer_form(self.template, tokenizer, rendered, use)
        if reasoning_tokens is not None and not form.thinks:
            raise InvalidParameterError(
                "the model's chat template knows of no reasoning that could have a budget",
                remedy="Leave the budget out, or choose a model that thinks.",
                parameter="reasoning_tokens",
            )
        request = self._request(rendered.token_ids, params, None)
        if request.grammar is not None and use.tools:
            raise InvalidParameterError(
                "a grammar for the answer and tools contradict each other",
                remedy="Leave one of them out.",
                parameter="response_format",
            )
        notices = list(rendered.notices)
        grammar = request.grammar or self._grammar_of_calls(form, use, notices)
        if form.thinks and not rendered.thought:
            if reasoning_tokens is not None:
                grammar = replace(grammar or Grammar("anything", ""), reasoning_tokens=reasoning_tokens)
            if grammar is not None:
                grammar = replace(grammar, after_reasoning="yes" if form.thinking else "maybe")
        if use.tools and grammar is not None and not use.strict:
            grammar = self._held_if_possible(grammar, notices)
        else:
            self._check(grammar)
        stops = request.stop_token_ids
        if form.single_call and form.syntax is not None and form.syntax.end in form.shown:
            stops |= {form.shown[form.syntax.end]}
        generation = Generation(
            replace(request, grammar=grammar, stop_token_ids=stops),
            tokenizer,
            params.stop,
            # A grammar describes the text from its first byte, so no space before it may be left out.
            continuation=grammar is not None and grammar.kind != "anything",
            shown=frozenset(form.shown.values()),
            notices=tuple(notices),
            output_filter=self.output_filter,
        )
        return generation, form

    def tool_use(
        self, tools: object, choice: object, *, several: bool = True, grammars: bool = True
    ) -> ToolUse:
        """What a request says of its tools, as `answer` takes it. `grammars`: whether what runs the model takes some.

        Raises InvalidParameterError, and UnsupportedParameterError where the template shows no tools, its syntax of
        calls is not known, or calls would have to be forced where there are no grammars.
        """
        checked = validate_tools(tools)
        required, only = validate_tool_choice(choice, {tool["function"]["name"] for tool in checked})
        if not checked or choice == "none":
            return NO_TOOLS
        arguments = _arguments(listed(tools) or ())
        why = None
        if self.template is not None and not self.template.takes_tools:
            why = "tools", "the model's chat template does not show them"
        elif self.template is not None and self.template.tool_syntax is None:
            why = "tools", "how the model writes calls of tools is not known here"
        elif (required or arguments == "strict") and not grammars:
            why = (
                "tool_choice" if required else "tools",
                "calls are forced by a grammar, and it takes none here",
            )
        if why is not None:
            raise UnsupportedParameterError(
                f"{why[0]} is not supported: {why[1]}",
                remedy="Leave it out, or choose another model.",
                parameter=why[0],
            )
        return ToolUse(
            tools=checked,
            required=required,
            only=only,
            several=several and only is None,
            arguments=arguments if grammars else "free",
        )

    def _grammar_of_calls(self, form: AnswerForm, use: ToolUse, notices: list[str]) -> Grammar | None:
        """Raises InvalidParameterError for strict tools whose calls could not be told from text."""
        if use.required or use.arguments == "free" or can_hold(form):
            return grammar_of_calls(form, use)
        if use.strict:
            raise InvalidParameterError(
                "a strict tool is offered to a model whose calls cannot be told from text",
                remedy='Use tool_choice "required", or leave strict out.',
                parameter="tools",
            )
        notices.append(_NOT_HELD.format("the model's marker of a call is mere text"))
        return None

    def _held_if_possible(self, grammar: Grammar, notices: list[str]) -> Grammar | None:
        """The grammar; what is left of it where the schemas of the tools cannot be enforced."""
        try:
            self._check(grammar)
        except InvalidGrammarError as error:
            notices.append(_NOT_HELD.format(error.message))
            return None if grammar.reasoning_tokens is None else replace(grammar, kind="anything", text="")
        return grammar

    def check_ids(self, ids: object, max_new_tokens: int | None) -> tuple[int, ...]:
        """Token ids that are in the vocabulary and fit the context."""
        return validate_prompt_ids(
            ids, vocab_size=self.vocab_size, context_tokens=self.context_tokens, max_new_tokens=max_new_tokens
        )

    def prompt_ids(self, prompt: object) -> object:
        """Ids are taken as they are; text gets BOS where the model wants it, and no control token from it."""
        if not isinstance(prompt, str | bytes):
            return prompt
        return self.require_tokenizer().encode_prompt(validate_text(prompt), parse_special=False)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        options: TemplateOptions = MappingProxyType({}),
    ) -> RenderedPrompt:
        """`tools` and `options` are checked (`octavo.validate`). Raises ChatTemplateError where the model has no
        template."""
        if self.template is None:
            raise ChatTemplateError(
                f"{self._location} has no chat template",
                remedy="Use --raw (LLM.generate) to continue text, or choose an instruct model.",
            )
        return self.template.render(
            validate_messages(messages), tools=tools, options=options, add_generation_prompt=True
        )

    def require_tokenizer(self) -> Tokenizer:
        """Raises IncompatibleModelError where the model has none."""
        if self.tokenizer is None:
            raise IncompatibleModelError(
                f"{self._location} has no tokenizer",
                remedy="Give token ids instead of text, or add the model's tokenizer.json to the folder.",
            )
        return self.tokenizer

    def _request(self, ids: object, params: SamplingParams, default_new_tokens: int | None) -> Request:
        checked = self.check_ids(ids, params.max_new_tokens)
        own_stops = frozenset() if params.ignore_eos else self.stop_token_ids
        return Request(
            prompt_token_ids=checked,
            sampling=self._sampling(params),
            max_new_tokens=resolve_max_new_tokens(
                params.max_new_tokens,
                default=default_new_tokens,
                prompt_tokens=len(checked),
                context_tokens=self.context_tokens,
            ),
            stop_token_ids=own_stops | frozenset(params.stop_token_ids),
            prompt_logprobs=params.prompt_logprobs,
            grammar=self._grammar(params),
            logits_processors=params.logits_processors,
        )

    def _grammar(self, params: SamplingParams) -> Grammar | None:
        """Not compiled yet: what comes before it, as reasoning may, is not known here."""
        grammar = resolve_grammar(params)
        if grammar is not None:
            self.require_tokenizer()
        return grammar

    def _check(self, grammar: Grammar | None) -> None:
        """In the caller's thread: the engine only copies what comes of it."""
        if grammar is not None:
            self._check_grammar(grammar)

    def _sampling(self, params: SamplingParams) -> Sampling:
        return resolve_sampling(
            params,
            defaults=self._defaults,
            vocab_size=self.vocab_size,
            seed_source=lambda: secrets.randbits(32),
        )


def _arguments(tools: Sequence[Any]) -> Literal["free", "held", "strict"]:
    """One grammar holds all calls or none: strict where a tool says so, free where one says that it is not."""
    said = {tool["function"].get("strict") for tool in tools}
    return "strict" if True in said else "free" if False in said else "held"
