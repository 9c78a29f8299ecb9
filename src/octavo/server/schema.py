"""The fields of every request, and for each whether it is honoured, refused or without effect.

One truth: requests are checked by these models, /openapi.json is made from them, and so is the support matrix in
docs/server.md. Types only; ranges are `octavo.validate`'s. A field that is not here is refused by name. None means
"not given", as the SDKs send it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
)

from octavo.server.faults import HttpFault, bad_request, unsupported
from octavo.validate.values import suggestion

Support = Literal["honoured", "refused", "ignored"]

ModelT = TypeVar("ModelT", bound=BaseModel)
Number = StrictInt | StrictFloat


def _said(support: Support, note: str, default: Any = None) -> Any:
    return Field(default=default, description=note, json_schema_extra={"x-octavo-support": support})


def honoured(note: str = "", *, default: Any = None) -> Any:
    return _said("honoured", note, default)


def refused(note: str) -> Any:
    """Any value but null is answered with 400."""
    return _said("refused", note)


def ignored(note: str) -> Any:
    """Without effect on the answer; named in the header x-octavo-ignored where it is given."""
    return _said("ignored", note)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


# --- parts -------------------------------------------------------------------------------------------


class TextPart(_Strict):
    type: Literal["text", "input_text", "output_text"]
    text: StrictStr
    annotations: list[Any] | None = ignored("citations of earlier turns")
    logprobs: list[Any] | None = ignored("of earlier turns")


class OtherPart(BaseModel):
    """An image, a sound or a file: recognised to be refused by name."""

    model_config = ConfigDict(extra="allow")
    type: Literal[
        "image_url",
        "input_image",
        "input_audio",
        "file",
        "input_file",
        "video_url",
        "audio_url",
        "refusal",
        "reasoning_text",
    ]


Content = StrictStr | list[Annotated[TextPart | OtherPart, Field(discriminator="type")]] | None


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = None
    name: StrictStr | None = ignored("templates do not show names of speakers")
    refusal: StrictStr | None = ignored("what was refused is not part of the conversation")
    reasoning_content: StrictStr | None = ignored("thoughts of earlier turns are left out")
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: StrictStr | None = None
    function_call: dict[str, Any] | None = None
    audio: dict[str, Any] | None = None
    annotations: list[Any] | None = ignored("citations of earlier turns")


class StreamOptions(_Strict):
    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = ignored("streams are not padded")


class JsonSchema(_Strict):
    name: StrictStr
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    description: StrictStr | None = ignored("say it in a message")
    strict: StrictBool | None = None
    """Schemas are always followed strictly."""


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JsonSchema | None = None
    regex: StrictStr | None = None
    grammar: StrictStr | None = None


class Reasoning(_Strict):
    effort: StrictStr | None = None
    max_tokens: StrictInt | None = None
    summary: StrictStr | None = refused("thoughts are given as they are")
    generate_summary: StrictStr | None = refused("thoughts are given as they are")


# --- requests ------------------------------------------------------------------------------------------


class _Sampled(_Strict):
    """What all routes that generate have in common."""

    model: StrictStr = honoured("a name of /v1/models", default=...)
    temperature: Number | None = honoured("0 to 100; 0 is greedy")
    top_p: Number | None = honoured("above 0, at most 1")
    top_k: StrictInt | None = honoured("0 is off")
    min_p: Number | None = honoured("0 to 1")
    seed: StrictInt | None = honoured("same seed, same tokens; a negative one counts modulo 2**64")
    stop: StrictStr | list[StrictStr] | None = honoured("up to 16 strings of up to 256 characters")
    stream: StrictBool | None = honoured("server-sent events; of /v1/responses named, and numbered in order")
    cache_salt: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = honoured(
        "separates prefix reuse further than the API key does"
    )
    user: StrictStr | None = ignored("no accounts here")


class _Chosen(_Sampled):
    """What chat and completions have in common."""

    repetition_penalty: Number | None = honoured("above 0, at most 10; 1 is off")
    presence_penalty: Number | None = honoured("-2 to 2")
    frequency_penalty: Number | None = honoured("-2 to 2")
    logit_bias: dict[str, Number] | None = honoured("token id -> -100 to 100")
    n: StrictInt | None = honoured("choices for each prompt")
    stop_token_ids: list[StrictInt] | None = honoured("more ids to stop at")
    ignore_eos: StrictBool | None = honoured("go on past the model's own stop tokens")
    stream_options: StreamOptions | None = honoured("include_usage; include_obfuscation has no effect")
    response_format: ResponseFormat | None = honoured("text, json_object, json_schema, regex, grammar (Lark)")


class _Conversed(_Sampled):
    """What chat and responses have in common."""

    parallel_tool_calls: StrictBool | None = honoured("false: calls after the first are dropped")
    service_tier: StrictStr | None = ignored("there is one tier")
    safety_identifier: StrictStr | None = ignored("no accounts here")
    prompt_cache_key: StrictStr | None = ignored("equal prefixes are found without it")
    prompt_cache_retention: StrictStr | None = ignored("kept as long as there is room")


class ChatRequest(_Chosen, _Conversed):
    """POST /v1/chat/completions"""

    messages: list[ChatMessage] = honoured(
        "text only; several text parts are joined by newlines", default=...
    )
    max_tokens: StrictInt | None = honoured("default: what is left of the context")
    max_completion_tokens: StrictInt | None = honoured("the same as max_tokens")
    logprobs: StrictBool | None = honoured("each token's logprob")
    top_logprobs: StrictInt | None = honoured("0 to 20 alternatives, with logprobs")
    tools: list[dict[str, Any]] | None = honoured(
        "functions, where the model's template shows them and its syntax of calls is known (Hermes and Qwen 2.5 and 3, "
        "Llama 3, Mistral); arguments follow their schemas where that can be had, surely where one is strict"
    )
    tool_choice: StrictStr | dict[str, Any] | None = honoured(
        '"auto"; "none" shows no tool to the model; with "required" or a function\'s name calls are forced, and their '
        "arguments follow their schemas"
    )
    reasoning_effort: StrictStr | None = honoured(
        'where the model\'s template knows it; "none" also where it knows enable_thinking'
    )
    chat_template_kwargs: dict[str, Any] | None = honoured(
        "enable_thinking, thinking, preserve_thinking, reasoning_effort, as far as the model's template knows them"
    )
    reasoning_budget: StrictInt | None = honoured(
        "most tokens of reasoning, where the model thinks: its end is then written for it; 0 is none"
    )
    reasoning: Reasoning | None = honoured("effort and max_tokens: reasoning_effort and reasoning_budget")
    chat_template: StrictStr | None = refused("templates come with the model only")
    functions: list[dict[str, Any]] | None = refused("deprecated by OpenAI; use tools")
    function_call: StrictStr | dict[str, Any] | None = refused("deprecated by OpenAI; use tool_choice")
    modalities: list[StrictStr] | None = honoured('only ["text"]')
    audio: dict[str, Any] | None = refused("text only")
    prediction: dict[str, Any] | None = ignored("would only make it faster")
    web_search_options: dict[str, Any] | None = refused("the server has no network")
    verbosity: StrictStr | None = refused("no model here knows it; say it in a message")
    metadata: dict[str, Any] | None = ignored("nothing is stored")
    store: StrictBool | None = ignored("nothing is stored")


class CompletionRequest(_Chosen):
    """POST /v1/completions"""

    prompt: StrictStr | list[StrictInt] | list[StrictStr] | list[list[StrictInt]] = honoured(
        "text, token ids, or a list of one of them; control tokens in text are plain text", default=...
    )
    max_tokens: StrictInt | None = honoured(
        "default the model's --max-new-tokens, else 16; 0 with echo only scores"
    )
    echo: StrictBool | None = honoured("the prompt in front of the answer; with logprobs also its logprobs")
    logprobs: StrictInt | None = honoured("0 to 20 alternatives at each token")
    best_of: StrictInt | None = honoured("only when equal to n")
    suffix: StrictStr | None = refused("no model here fills in the middle")


class InputItem(BaseModel):
    """A message, a call of a function or its output; other items are recognised to be refused by name."""

    model_config = ConfigDict(extra="allow")
    type: StrictStr | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Content = None
    id: StrictStr | None = ignored("nothing is kept between requests")
    status: StrictStr | None = ignored("items are taken as they are")
    call_id: StrictStr | None = None
    name: StrictStr | None = None
    arguments: StrictStr | None = None
    output: Content = None


class TextFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: StrictStr | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    description: StrictStr | None = ignored("say it in a message")
    strict: StrictBool | None = None

    def as_chat(self) -> ResponseFormat:
        """The same in the words of chat completions."""
        if self.type != "json_schema":
            return ResponseFormat(type=self.type)
        values = {"name": self.name or "answer", "schema": self.schema_, "strict": self.strict}
        return ResponseFormat(type="json_schema", json_schema=JsonSchema.model_validate(values))


class ResponseText(_Strict):
    format: TextFormat | None = None
    verbosity: StrictStr | None = ignored("no model here knows it; say it in a message")


class ResponsesRequest(_Conversed):
    """POST /v1/responses"""

    input: StrictStr | list[InputItem] = honoured(
        "text, or items: messages, function_call and function_call_output; reasoning items have no effect",
        default=...,
    )
    instructions: StrictStr | None = honoured("a system message in front")
    max_output_tokens: StrictInt | None = honoured("default: what is left of the context")
    text: ResponseText | None = honoured("format text, json_object or json_schema; verbosity has no effect")
    tools: list[dict[str, Any]] | None = honoured("functions only, as in chat completions")
    tool_choice: StrictStr | dict[str, Any] | None = honoured("as in chat completions")
    truncation: StrictStr | None = honoured('only "disabled": prompts are never cut')
    store: StrictBool | None = honoured("only false: nothing is kept")
    background: StrictBool | None = honoured("only false")
    previous_response_id: StrictStr | None = refused("nothing is kept between requests: send the whole input")
    conversation: StrictStr | dict[str, Any] | None = refused("nothing is kept between requests")
    include: list[StrictStr] | None = refused("there is nothing more to include")
    prompt: dict[str, Any] | None = refused("there are no stored prompts")
    reasoning: Reasoning | None = honoured(
        "effort and max_tokens: reasoning_effort and reasoning_budget of chat completions; no summaries"
    )
    top_logprobs: StrictInt | None = refused("use /v1/chat/completions for logprobs")
    max_tool_calls: StrictInt | None = ignored("it counts the server's own tools, and there are none")
    stream_options: StreamOptions | None = ignored("usage comes with the last event anyway")
    metadata: dict[str, Any] | None = honoured("given back as it is")


class TokenizeRequest(_Strict):
    """POST /tokenize"""

    model: StrictStr | None = honoured("default: the first model")
    prompt: StrictStr | None = honoured("text to cut into tokens")
    messages: list[ChatMessage] | None = honoured("or a chat, in the model's template")
    add_special_tokens: StrictBool | None = honoured("BOS in front where the model has one; default true")


class DetokenizeRequest(_Strict):
    """POST /detokenize"""

    model: StrictStr | None = honoured("default: the first model")
    tokens: list[StrictInt] = honoured("token ids", default=...)


class AdminRequest(_Strict):
    """POST /admin/models/load and /admin/models/unload"""

    model: StrictStr = honoured("a name of /v1/models", default=...)


def read(cls: type[ModelT], body: Mapping[str, Any]) -> tuple[ModelT, tuple[str, ...]]:
    """The request, and the names of fields that were given and have no effect. Raises HttpFault naming `param`."""
    try:
        request = cls.model_validate(body)
    except ValidationError as error:
        raise _explained(cls, error) from None
    _refuse(request, "")
    return request, tuple(dict.fromkeys(_without_effect(request, "")))


def _refuse(part: BaseModel, path: str) -> None:
    """Raises HttpFault for a field that was given and is refused."""
    for name, field in type(part).model_fields.items():
        value, here = getattr(part, name), f"{path}.{name}" if path else name
        if support_of(field) == "refused" and value not in (None, [], {}):
            raise unsupported(here, str(field.description))
        if isinstance(value, BaseModel):
            _refuse(value, here)


def _without_effect(part: object, path: str) -> Iterator[str]:
    """Names of fields that were given and are ignored; of a list's items as of one."""
    if isinstance(part, list):
        for each in part:
            yield from _without_effect(each, path)
    if not isinstance(part, BaseModel):
        return
    for name, field in type(part).model_fields.items():
        if name not in part.model_fields_set:
            continue
        value = getattr(part, name)
        here = f"{path}.{name}" if path else name
        if support_of(field) == "ignored":
            if value not in (None, []):
                yield here
        else:
            yield from _without_effect(value, here)


def support_of(field: Any) -> Support:
    extra = field.json_schema_extra
    return extra["x-octavo-support"] if isinstance(extra, dict) else "honoured"


def _explained(cls: type[BaseModel], error: ValidationError) -> HttpFault:
    first = max(error.errors(include_url=False, include_input=False, include_context=False), key=_depth)
    path = [str(part) if isinstance(part, int) else part for part in first["loc"]]
    param = _param(first["loc"])
    if first["type"] == "extra_forbidden":
        known = tuple(cls.model_fields) if len(path) == 1 else ()
        hint = suggestion(path[-1], known, "Leave it out.") if known else "Leave it out."
        return bad_request(
            f"{param[:80]} is not a known field. {hint}", code="unsupported_parameter", param=param[:80]
        )
    if first["type"] == "missing":
        return bad_request(f"{param} is missing", code="missing_required_parameter", param=param)
    return bad_request(f"{param}: {first['msg'].lower()}", param=param)


def _depth(error: Any) -> tuple[bool, int]:
    """Of a union's errors, the one that got furthest says most; unknown fields first."""
    return error["type"] == "extra_forbidden", len(error["loc"])


def _param(loc: tuple[int | str, ...]) -> str:
    """messages[0].content, without the names pydantic gives to a union's branches."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part not in _BRANCHES:
            text += f".{part}" if text else part
    return text or str(loc[0])


_BRANCHES = {"str", "int", "float", "TextPart", "OtherPart", "dict", "list", "constrained"}
