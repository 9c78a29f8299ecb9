"""`LLM`: a loaded model to generate, chat and score with. The Python API, and what the command line stands on.

Has a backend, a tokenizer and a template, and owns the thread that steps the engine (through `Driver`).
Checking is `octavo.validate`'s work, text `octavo.text`'s, loading `octavo.loading`'s.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

from octavo.backends.driver import Driver
from octavo.errors import ChatTemplateError, IncompatibleModelError, InvalidInputError
from octavo.generation import Generation, Inbox, TextStream
from octavo.loading import PlannedModel, load_backend, plan_model
from octavo.settings import DtypeName, IsaName, QuantName, RunnerName, SamplingParams, Settings
from octavo.text.chat import ChatTemplate, RenderedPrompt
from octavo.text.stop_tokens import stop_token_ids
from octavo.text.tokenizer import Tokenizer, load_tokenizer
from octavo.types import Completion, Message, Progress, Request, Sampling, Score, TextEvent
from octavo.validate import (
    read_sampling_defaults,
    resolve_max_new_tokens,
    resolve_sampling,
    split_prompts,
    validate_messages,
    validate_prompt_ids,
    validate_sampling_params,
    validate_text,
)

Prompt = str | Sequence[int]
"""A raw continuation, or token ids taken as they are."""

DEFAULT_MAX_NEW_TOKENS = 256
"""For `generate`; `chat` takes what is left of the context."""


class LLM:
    """A loaded model. Close it (or use `with`) to give its memory back.

    `LLM()` is the default model; `model` is a hub id, a folder of safetensors, or a .gguf file. The other
    arguments are the fields of `Settings`. Thread-safe: several threads may generate at once.

    Raises ModelNotFoundError, IncompatibleModelError, NotEnoughMemoryError (before anything is loaded),
    NotEnoughDiskError, DeviceError and InvalidParameterError, each with a remedy.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        revision: str | None = None,
        quant: QuantName = "auto",
        device: str = "auto",
        dtype: DtypeName = "auto",
        runner: RunnerName = "auto",
        isa: IsaName = "auto",
        context: int | None = None,
        max_sequences: int = 1,
        threads: int | None = None,
        offline: bool = False,
        cache_dir: str | Path | None = None,
        cache: bool = True,
        progress: Progress | None = None,
    ) -> None:
        started = time.perf_counter()
        self._state = "loading"
        settings = Settings(
            model=None if model is None else str(model),
            revision=revision,
            quant=quant,
            device=device,
            dtype=dtype,
            runner=runner,
            isa=isa,
            context=context,
            max_sequences=max_sequences,
            threads=threads,
            offline=offline,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            cache=cache,
        )
        planned = plan_model(settings, progress=progress)
        source = planned.source
        tokenizer: Tokenizer | None = None
        if source.tokenizer is not None:
            tokenizer = load_tokenizer(source.tokenizer, model_vocab_size=planned.spec.vocab_size)
        self._tokenizer = tokenizer
        self._template: ChatTemplate | None = None
        if source.chat_template is not None and tokenizer is not None:
            self._template = ChatTemplate(source.chat_template, tokenizer)
        self._stop_token_ids = stop_token_ids(
            source.config, source.generation_config, tokenizer, self._template
        )
        self._defaults = read_sampling_defaults(source.generation_config)
        loaded = load_backend(planned, progress=progress)
        about_text = () if tokenizer is None else tokenizer.notices
        self.notices = tuple(
            dict.fromkeys((*source.notices, *about_text, *self._defaults.notices, *loaded.notices))
        )
        """What the user should know of the load: a cache entry made again, the hub not reached."""
        self._packed_from_cache = loaded.packed_from_cache
        # Nothing is read any more: without this the checkpoint's files stay mapped as long as the LLM lives.
        self._planned = dataclasses.replace(planned, source=dataclasses.replace(source, tensors={}))
        self._driver = Driver(loaded.backend)
        # Dropped without close: the thread must not keep the memory.
        weakref.finalize(self, self._driver.stop)
        self._load_seconds = time.perf_counter() - started
        self._state = "ready"

    @classmethod
    def from_settings(cls, settings: Settings, *, progress: Progress | None = None) -> Self:
        """The model that `settings` names, with `progress` called as it is fetched, packed and loaded."""
        values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
        return cls(**values, progress=progress)

    # --- generating -------------------------------------------------------------------------------------

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a Sequence[str] too
        self, prompts: Prompt, params: SamplingParams | None = None
    ) -> Completion: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | None = None
    ) -> list[Completion]: ...
    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None
    ) -> Completion | list[Completion]:
        """Continue a prompt, or each of a list of prompts (together, as far as `max_sequences` allows).

        A string is continued as it is, without chat template; a sequence of ints is token ids. Raises
        EmptyPromptError, NotTextError, ContextLengthError, InvalidParameterError, and NumericalError where
        the model's logits were not finite.
        """
        params = self._checked(params)
        each, many = split_prompts(prompts)
        done = self._run([self._raw(prompt, params) for prompt in each])
        return done if many else done[0]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[TextEvent]:
        """As `generate`, a piece at a time. Abandoning the iterator cancels the request."""
        params = self._checked(params)
        return self._stream(self._raw(prompt, params))

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Completion:
        """The answer to a conversation, in the model's own template.

        Text in a message never becomes a control token. Raises ChatTemplateError where the model has no
        template, and what `generate` raises.
        """
        params = self._checked(params)
        return self._run([self._chat(messages, params)])[0]

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None
    ) -> Iterator[TextEvent]:
        """As `chat`, a piece at a time. Abandoning the iterator cancels the request."""
        params = self._checked(params)
        return self._stream(self._chat(messages, params))

    def score(self, text: Prompt) -> Score:
        """log p(token i+1 | tokens <= i) of a text of at least two tokens, and its perplexity."""
        ids = validate_prompt_ids(
            self._raw_ids(text),
            vocab_size=self._planned.spec.vocab_size,
            context_tokens=self.context_tokens,
            max_new_tokens=0,
        )
        if len(ids) < 2:
            raise InvalidInputError(
                "a text of one token has nothing to score", remedy="Give a text of at least two tokens."
            )
        request = Request(ids, Sampling(), max_new_tokens=0, prompt_logprobs=0)
        events = Inbox()
        request_id = self._driver.submit(request, events.put)
        try:
            event, _ = events.get()
        finally:
            self._driver.cancel(request_id)
        if event.error is not None:
            raise event.error
        assert event.prompt_logprobs is not None
        logprobs = tuple(entry.logprob for entry in event.prompt_logprobs)
        mean = -math.fsum(logprobs) / len(logprobs)
        # math.exp raises beyond 709 nats, which random weights can reach.
        return Score(ids, logprobs, math.exp(mean) if mean < 709 else math.inf)

    # --- tokens -------------------------------------------------------------------------------------------

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text alone: no BOS is added, and control tokens in it are plain text."""
        tokenizer = self._require_tokenizer()
        return [] if text == "" else tokenizer.encode(validate_text(text), parse_special=False)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids; control tokens are left out."""
        return self._require_tokenizer().decode(token_ids)

    def count_chat_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens a conversation takes in the model's template, with the header of the answer."""
        return len(self._render(messages).token_ids)

    # --- facts --------------------------------------------------------------------------------------------

    @property
    def context_tokens(self) -> int:
        return self._planned.plan.context.tokens

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def info(self) -> dict[str, Any]:
        """The facts of --json: what runs, where and how, compiled counters, memory by part in bytes."""
        plan, source = self._planned.plan, self._planned.source
        running = self._driver.backend.info() if self._state == "ready" else {}
        return {
            "state": self._state,
            "model": source.location,
            "revision": source.revision,
            "quant": _quant_name(self._planned),
            "quantized_as": list(source.quantized_as),
            "device": plan.config.device,
            "device_reason": self._planned.device_reason,
            "runner": plan.runner,
            "dtype": plan.dtypes.compute,
            "kv_dtype": plan.dtypes.kv,
            "context_tokens": plan.context.tokens,
            "max_sequences": plan.config.max_slots,
            "packed_from_cache": self._packed_from_cache,
            "load_seconds": self._load_seconds,
            "memory": dict(running.get("memory", {})),
            "compiled": dict(running.get("compiled", {})),
            "engine": dict(running.get("engine", {})),
        }

    def close(self) -> None:
        """End what is running with ClosedError and give all memory back. Idempotent."""
        self._state = "closed"
        self._driver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- from what the user said to a request ---------------------------------------------------------------

    def _checked(self, params: SamplingParams | None) -> SamplingParams:
        return validate_sampling_params(params or SamplingParams(), vocab_size=self._planned.spec.vocab_size)

    def _raw(self, prompt: object, params: SamplingParams) -> Generation:
        request = self._request(self._raw_ids(prompt), params, DEFAULT_MAX_NEW_TOKENS)
        return Generation(request, self._tokenizer, params.stop, continuation=True)

    def _chat(self, messages: Sequence[Message], params: SamplingParams) -> Generation:
        rendered = self._render(messages)
        request = self._request(rendered.token_ids, params, None)
        return Generation(request, self._tokenizer, params.stop, notices=rendered.notices)

    def _request(self, ids: object, params: SamplingParams, default_new_tokens: int | None) -> Request:
        checked = validate_prompt_ids(
            ids,
            vocab_size=self._planned.spec.vocab_size,
            context_tokens=self.context_tokens,
            max_new_tokens=params.max_new_tokens,
        )
        own_stops = frozenset() if params.ignore_eos else self._stop_token_ids
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
        )

    def _raw_ids(self, prompt: object) -> object:
        """Ids are taken as they are; text gets BOS where the model wants it, and no control token from it."""
        if not isinstance(prompt, str | bytes):
            return prompt
        return self._require_tokenizer().encode_prompt(validate_text(prompt), parse_special=False)

    def _render(self, messages: Sequence[Message]) -> RenderedPrompt:
        if self._template is None:
            raise ChatTemplateError(
                f"{self._planned.source.location} has no chat template",
                remedy="Use --raw (LLM.generate) to continue text, or choose an instruct model.",
            )
        return self._template.render(validate_messages(messages), add_generation_prompt=True)

    def _sampling(self, params: SamplingParams) -> Sampling:
        return resolve_sampling(
            params,
            defaults=self._defaults,
            vocab_size=self._planned.spec.vocab_size,
            seed_source=lambda: secrets.randbits(32),
        )

    def _require_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise IncompatibleModelError(
                f"{self._planned.source.location} has no tokenizer",
                remedy="Give token ids instead of text, or add the model's tokenizer.json to the folder.",
            )
        return self._tokenizer

    # --- from a request to its text -------------------------------------------------------------------------

    def _stream(self, generation: Generation) -> TextStream:
        """Submits now, so that errors come from the call and not from the first `next`."""
        events = Inbox()
        request_id = self._driver.submit(generation.begin(), events.put)
        return TextStream(generation, events, lambda: self._driver.cancel(request_id))

    def _run(self, generations: Sequence[Generation]) -> list[Completion]:
        """All requests at once; one that fails ends the others too, since its caller gets no result."""
        events = Inbox()
        still_open: dict[int, int] = {}  # request id -> index
        done: dict[int, Completion] = {}
        try:
            for index, generation in enumerate(generations):
                still_open[self._driver.submit(generation.begin(), events.put)] = index
            while still_open:
                event, came_at = events.get()
                if event.request_id not in still_open:
                    continue  # it had met its stop string
                index = still_open[event.request_id]
                completion = generations[index].accept(event, came_at).completion
                if completion is not None:
                    done[index] = completion
                    del still_open[event.request_id]
                    self._driver.cancel(event.request_id)
        finally:
            for request_id in still_open:
                self._driver.cancel(request_id)
        return [done[index] for index in range(len(generations))]


def _quant_name(model: PlannedModel) -> str:
    """The matrices' formats, the one with most bytes first: "int8", "q4_1 + q8_0"."""
    roles = {p.name: p.role for p in model.parameters}
    matrices = {f.name for name, f in model.plan.formats.items() if roles[name] != "vector"}
    return " + ".join(part.format for part in model.plan.weights if part.format in matrices)
