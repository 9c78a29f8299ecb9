"""A checked API request and a loaded model -> the sequences to run. The one validator has the last word on values.

Runs beside the loop: tokenizing and templates take time. What the answer looks like is the routes' work.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from octavo.frontend import Frontend
from octavo.generation import Generation
from octavo.server.answer import AnswerParser, PlainAnswer
from octavo.server.faults import bad_request, unsupported
from octavo.server.models import Resident
from octavo.server.schema import ChatMessage, ChatRequest, CompletionRequest, OtherPart
from octavo.server.settings import ServerSettings
from octavo.settings import SamplingParams
from octavo.types import Message, Request
from octavo.validate import split_prompts
from octavo.validate.values import integer

DEFAULT_COMPLETION_TOKENS = 16
"""Of /v1/completions, as OpenAI's."""

_SAME_NAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "ignore_eos",
)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Sequences to run together; of prompt p and choice c the index is p * n + c."""

    generations: tuple[Generation, ...]
    requests: tuple[Request, ...]
    n: int
    prompt_texts: tuple[str, ...] = ()
    """What echo puts in front, one a prompt."""

    def parser(self) -> AnswerParser:
        """For one sequence: what becomes of its text."""
        return PlainAnswer()

    @property
    def prompt_tokens(self) -> int:
        """Of all sequences: what the queue counts."""
        return sum(len(request.prompt_token_ids) for request in self.requests)


def prepare_chat(request: ChatRequest, model: Resident, limits: ServerSettings, salt: str) -> Prepared:
    """Raises HttpFault and what `octavo.frontend.Frontend` raises."""
    params = _params(request, model.served.sampling, _max_tokens(request))
    params = dataclasses.replace(params, logprobs=_chat_logprobs(request))
    _check_chat_only(request)
    n = _choices(request.n, 1, limits)
    messages = plain_messages(request.messages, limits)
    frontend = model.frontend
    if frontend.template is None:
        raise bad_request(
            f"{model.served.name} has no chat template: use /v1/completions, or an instruct model",
            code="chat_template_missing",
        )
    first = frontend.chat(messages, frontend.check_params(params)).begin()
    requests = _each_choice(_salted(first, salt, request.cache_salt), n)
    generations = tuple(Generation(each, frontend.tokenizer, params.stop) for each in requests)
    return Prepared(generations, requests, n)


def prepare_completion(
    request: CompletionRequest, model: Resident, limits: ServerSettings, salt: str
) -> Prepared:
    """Raises HttpFault and what `octavo.frontend.Frontend` raises."""
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise unsupported("best_of", "only the value of n is")
    prompts, _ = split_prompts(request.prompt)
    if len(prompts) > limits.max_prompts:
        raise bad_request(f"{len(prompts)} prompts; at most {limits.max_prompts} are taken", param="prompt")
    n = _choices(request.n, len(prompts), limits)
    score_only = request.max_tokens == 0
    if score_only and not request.echo:
        raise bad_request("max_tokens 0 needs echo: there would be no text at all", param="max_tokens")
    asked = (
        1 if score_only else DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    )
    params = _params(request, model.served.sampling, None)
    params = dataclasses.replace(params, logprobs=request.logprobs, max_new_tokens=asked)
    if request.max_tokens is None:
        params = dataclasses.replace(params, max_new_tokens=None)
    frontend = model.frontend
    params = frontend.check_params(params)
    requests: list[Request] = []
    generations: list[Generation] = []
    texts: list[str] = []
    for prompt in prompts:
        first = _first_of(prompt, params, request, frontend, score_only)
        each = _each_choice(_salted(first, salt, request.cache_salt), n)
        requests += each
        generations += [Generation(one, frontend.tokenizer, params.stop, continuation=True) for one in each]
        texts.append(_prompt_text(prompt, frontend) if request.echo else "")
    return Prepared(tuple(generations), tuple(requests), n, tuple(texts))


def plain_messages(messages: Sequence[ChatMessage], limits: ServerSettings) -> list[Message]:
    """Role and text of each. Raises HttpFault naming what is no text."""
    if len(messages) > limits.max_messages:
        raise bad_request(
            f"{len(messages)} messages; at most {limits.max_messages} are taken", param="messages"
        )
    return [_plain(place, message) for place, message in enumerate(messages)]


def _plain(place: int, message: ChatMessage) -> Message:
    where = f"messages[{place}]"
    if message.role in ("tool", "function"):
        raise unsupported(f"{where}.role", "tool calls are not served yet")
    for name in ("tool_calls", "function_call", "tool_call_id", "audio"):
        if getattr(message, name):
            raise unsupported(f"{where}.{name}", "tool calls and sound are not served")
    content = message.content
    if content is None:
        raise bad_request(f"{where}.content is missing", param=f"{where}.content")
    if not isinstance(content, str):
        texts = []
        for number, part in enumerate(content):
            if isinstance(part, OtherPart):
                raise unsupported(f"{where}.content[{number}]", f"{part.type} is no text")
            texts.append(part.text)
        content = "\n".join(texts)
    return Message(role="system" if message.role == "developer" else message.role, content=content)


def ignored_in_messages(messages: Sequence[ChatMessage]) -> tuple[str, ...]:
    """Fields of messages that are given and have no effect."""
    names = ("name", "reasoning_content", "annotations", "refusal")
    return tuple(f"messages.{name}" for name in names if any(getattr(m, name) for m in messages))


def _params(request: Any, base: SamplingParams, max_tokens: int | None) -> SamplingParams:
    """What the request says, over what holds for the model."""
    said: dict[str, Any] = {
        name: value for name in _SAME_NAME if (value := getattr(request, name)) is not None
    }
    if max_tokens is not None:
        said["max_new_tokens"] = max_tokens
    if request.stop is not None:
        said["stop"] = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    if request.stop_token_ids is not None:
        said["stop_token_ids"] = tuple(request.stop_token_ids)
    if request.seed is not None:
        said["seed"] = request.seed % (1 << 64) if -(1 << 63) <= request.seed < 0 else request.seed
    return dataclasses.replace(base, **said)


def _max_tokens(request: ChatRequest) -> int | None:
    both = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(both) > 1:
        raise bad_request(
            "max_tokens and max_completion_tokens differ: give one", param="max_completion_tokens"
        )
    return both.pop() if both else None


def _chat_logprobs(request: ChatRequest) -> int | None:
    if request.logprobs:
        return request.top_logprobs or 0
    if request.top_logprobs:
        raise bad_request("top_logprobs needs logprobs: true", param="top_logprobs")
    return None


def _check_chat_only(request: ChatRequest) -> None:
    if request.modalities is not None and request.modalities != ["text"]:
        raise unsupported("modalities", 'only ["text"] is')
    if request.tool_choice not in (None, "none", "auto"):
        raise unsupported("tool_choice", "there are no tools to choose")
    if request.response_format is not None and request.response_format.type != "text":
        raise unsupported("response_format", f"{request.response_format.type} is not served yet")


def _choices(n: int | None, prompts: int, limits: ServerSettings) -> int:
    count = 1 if n is None else n
    if not 1 <= count <= limits.max_choices:
        raise bad_request(f"n is {_shown(count)}; it must be from 1 to {limits.max_choices}", param="n")
    if count * prompts > limits.max_sequences_each:
        raise bad_request(
            f"{prompts} prompts times n {count} make {count * prompts} sequences; at most "
            f"{limits.max_sequences_each} are run for one request",
            param="n",
        )
    return count


def _shown(number: int) -> str:
    return str(number) if number.bit_length() <= 64 else "a very long number"


def _each_choice(request: Request, n: int) -> tuple[Request, ...]:
    """The same seed for all: the choice's number is part of the noise's key."""
    return tuple(
        dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, choice=choice))
        for choice in range(n)
    )


def _salted(request: Request, salt: str, asked: str | None) -> Request:
    """Separated by API key, and further by what the client asked for. A digest: neither can spell the other."""
    if not salt and not asked:
        return request
    return dataclasses.replace(
        request, salt=hashlib.sha256(f"{salt}/{asked or ''}".encode()).hexdigest()[:32]
    )


def _first_of(
    prompt: object, params: SamplingParams, request: CompletionRequest, frontend: Frontend, score_only: bool
) -> Request:
    if score_only:
        ids = frontend.check_ids(frontend.prompt_ids(prompt), 0)
        # A placeholder of one token has the right sampling; nothing is generated from it.
        short = frontend.raw([ids[0]], dataclasses.replace(params, max_new_tokens=1)).begin()
        return dataclasses.replace(
            short, prompt_token_ids=ids, max_new_tokens=0, prompt_logprobs=request.logprobs or 0
        )
    if params.max_new_tokens is None:
        ids = frontend.check_ids(frontend.prompt_ids(prompt), None)
        left = frontend.context_tokens - len(ids)
        params = dataclasses.replace(params, max_new_tokens=min(DEFAULT_COMPLETION_TOKENS, left))
    first = frontend.raw(prompt, params).begin()
    if request.echo and request.logprobs is not None:
        first = dataclasses.replace(first, prompt_logprobs=request.logprobs)
    return first


def _prompt_text(prompt: object, frontend: Frontend) -> str:
    if isinstance(prompt, str):
        return prompt
    assert isinstance(prompt, (list, tuple))
    ids = [value for value in map(integer, prompt) if value is not None]
    return (
        ""
        if frontend.tokenizer is None
        else frontend.tokenizer.decode(ids, keep_special=True, continuation=True)
    )
