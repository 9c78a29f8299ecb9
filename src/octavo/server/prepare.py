"""A checked API request and a loaded model -> the sequences to run. The one validator has the last word on values.

Runs beside the loop: tokenizing and templates take time. What the answer looks like is the routes' work.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

from octavo.errors import InvalidGrammarError
from octavo.frontend import Frontend
from octavo.generation import Generation
from octavo.server.faults import bad_request, unsupported
from octavo.server.messages import plain_messages
from octavo.server.models import Resident
from octavo.server.schema import ChatRequest, CompletionRequest, ResponseFormat
from octavo.server.settings import ServerSettings
from octavo.server.tools import grammar_fault, reasoning_tokens, template_options, tool_use
from octavo.settings import SamplingParams
from octavo.text.answer import AnswerForm
from octavo.text.tokenizer import Tokenizer
from octavo.types import Request
from octavo.validate import split_prompts
from octavo.validate.values import integer

DEFAULT_COMPLETION_TOKENS = 16
"""Of /v1/completions where the model has none of its own, as OpenAI's."""

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

_PLAIN = AnswerForm()


@dataclass(frozen=True, slots=True)
class Prepared:
    """Sequences to run together; of prompt p and choice c the index is p * n + c."""

    generations: tuple[Generation, ...]
    requests: tuple[Request, ...]
    n: int
    prompt_texts: tuple[str, ...] = ()
    """What echo puts in front, one a prompt."""
    form: AnswerForm = _PLAIN
    """What the answers may be made of."""
    tokenizer: Tokenizer | None = None

    @property
    def prompt_tokens(self) -> int:
        """Of all sequences: what the queue counts."""
        return sum(len(request.prompt_token_ids) for request in self.requests)


def may_compile(request: ChatRequest | CompletionRequest) -> bool:
    """Whether preparing it may compile a grammar, which can take seconds."""
    asked = request.response_format
    return (asked is not None and asked.type != "text") or bool(getattr(request, "tools", None))


def prepare_chat(request: ChatRequest, model: Resident, limits: ServerSettings, salt: str) -> Prepared:
    """Raises HttpFault and what `octavo.frontend.Frontend` raises."""
    _check_chat_only(request)
    frontend = model.frontend
    if request.logprobs and frontend.output_filter is not None:
        raise unsupported("logprobs", "an output filter is in use, and they would show what it hides")
    params = dataclasses.replace(
        _params(request, model.served.sampling),
        max_new_tokens=_max_tokens(request, model.served.sampling.max_new_tokens),
        logprobs=_chat_logprobs(request),
        **_grammar(request.response_format, model),
    )
    n = _choices(request.n, 1, limits)
    messages = plain_messages(request.messages, limits)
    if frontend.template is None:
        raise bad_request(
            f"{model.served.name} has no chat template: use /v1/completions, or an instruct model",
            code="chat_template_missing",
        )
    use = tool_use(request, model)
    try:
        first, form = frontend.answer(
            messages,
            frontend.check_params(params),
            use=use,
            options=template_options(request, frontend.template),
            reasoning_tokens=reasoning_tokens(request, model),
        )
    except InvalidGrammarError as error:
        raise grammar_fault(error, of_tools=bool(use.tools)) from None
    generations = first.of_choices(n)
    requests = tuple(_salted(each.begin(), salt, request.cache_salt) for each in generations)
    return Prepared(generations, requests, n, form=form, tokenizer=frontend.tokenizer)


def prepare_completion(
    request: CompletionRequest, model: Resident, limits: ServerSettings, salt: str
) -> Prepared:
    """Raises HttpFault and what `octavo.frontend.Frontend` raises."""
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise unsupported("best_of", "only the value of n is")
    if request.max_tokens == 0 and not request.echo:
        raise bad_request("max_tokens 0 needs echo: there would be no text at all", param="max_tokens")
    prompts, _ = split_prompts(request.prompt)
    if len(prompts) > limits.max_prompts:
        raise bad_request(f"{len(prompts)} prompts; at most {limits.max_prompts} are taken", param="prompt")
    n = _choices(request.n, len(prompts), limits)
    frontend = model.frontend
    if request.logprobs is not None and frontend.output_filter is not None and request.max_tokens != 0:
        raise unsupported("logprobs", "an output filter is in use, and they would show what it hides")
    params = frontend.check_params(
        dataclasses.replace(
            _params(request, model.served.sampling),
            max_new_tokens=request.max_tokens or None,
            logprobs=request.logprobs,
            **_grammar(request.response_format, model),
        )
    )
    default_tokens = model.served.sampling.max_new_tokens or DEFAULT_COMPLETION_TOKENS
    generations: list[Generation] = []
    requests: list[Request] = []
    texts: list[str] = []
    for prompt in prompts:
        score_only = request.max_tokens == 0
        each = _continuation(
            prompt, params, frontend, default_tokens=default_tokens, score_only=score_only
        ).of_choices(n)
        generations += each
        requests += [_salted(_scored(one.begin(), request), salt, request.cache_salt) for one in each]
        texts.append(_prompt_text(prompt, frontend) if request.echo else "")
    return Prepared(tuple(generations), tuple(requests), n, tuple(texts))


def _params(request: Any, base: SamplingParams) -> SamplingParams:
    """What the request says, over what holds for the model."""
    said: dict[str, Any] = {
        name: value for name in _SAME_NAME if (value := getattr(request, name)) is not None
    }
    if request.stop is not None:
        said["stop"] = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    if request.stop_token_ids is not None:
        said["stop_token_ids"] = tuple(request.stop_token_ids)
    if request.seed is not None:
        said["seed"] = request.seed % (1 << 64) if -(1 << 63) <= request.seed < 0 else request.seed
    return dataclasses.replace(base, n=1, **said)


def _grammar(asked: ResponseFormat | None, model: Resident) -> dict[str, Any]:
    """The field of SamplingParams that says the same."""
    if asked is None or asked.type == "text":
        return {}
    if not model.ready.grammars:
        raise unsupported("response_format", f"{model.served.name} runs where there are no grammars")
    fields: dict[str, dict[str, Any]] = {
        "json_object": {"json_object": True},
        "json_schema": {"json_schema": None if asked.json_schema is None else asked.json_schema.schema_},
        "regex": {"regex": asked.regex},
        "grammar": {"lark": asked.grammar},
    }
    found = fields[asked.type]
    if None in found.values():
        raise bad_request(
            f"response_format of type {asked.type} needs {asked.type}", param=f"response_format.{asked.type}"
        )
    return found


def _max_tokens(request: ChatRequest, default: int | None) -> int | None:
    both = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(both) > 1:
        raise bad_request(
            "max_tokens and max_completion_tokens differ: give one", param="max_completion_tokens"
        )
    return both.pop() if both else default


def _chat_logprobs(request: ChatRequest) -> int | None:
    if request.logprobs:
        return request.top_logprobs or 0
    if request.top_logprobs:
        raise bad_request("top_logprobs needs logprobs: true", param="top_logprobs")
    return None


def _check_chat_only(request: ChatRequest) -> None:
    if request.modalities is not None and request.modalities != ["text"]:
        raise unsupported("modalities", 'only ["text"] is')


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


def _salted(request: Request, salt: str, asked: str | None) -> Request:
    """Separated by API key, and further by what the client asked for. A digest: neither can spell the other."""
    if not salt and not asked:
        return request
    return dataclasses.replace(
        request, salt=hashlib.sha256(f"{salt}/{asked or ''}".encode()).hexdigest()[:32]
    )


def _continuation(
    prompt: object, params: SamplingParams, frontend: Frontend, *, default_tokens: int, score_only: bool
) -> Generation:
    ids = frontend.check_ids(frontend.prompt_ids(prompt), 0 if score_only else params.max_new_tokens)
    if score_only:
        # A request for one token stands in: it has the right sampling, and `_scored` asks for none.
        short = frontend.raw(ids[:1], dataclasses.replace(params, max_new_tokens=1)).begin()
        whole = dataclasses.replace(short, prompt_token_ids=ids)
        return Generation(whole, frontend.tokenizer, params.stop, continuation=True)
    if params.max_new_tokens is None:
        left = frontend.context_tokens - len(ids)
        params = dataclasses.replace(params, max_new_tokens=min(default_tokens, left))
    return frontend.raw(ids, params)


def _scored(request: Request, asked: CompletionRequest) -> Request:
    """With the prompt's logprobs, where echo shows them or nothing else is to be had."""
    if asked.max_tokens == 0:
        return dataclasses.replace(request, max_new_tokens=0, prompt_logprobs=asked.logprobs or 0)
    if asked.echo and asked.logprobs is not None:
        return dataclasses.replace(request, prompt_logprobs=asked.logprobs)
    return request


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
