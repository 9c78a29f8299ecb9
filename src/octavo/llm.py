"""`LLM`: a loaded model to generate, chat and score with. The Python API, and what the command line stands on.

Has a backend, a tokenizer and a template, and owns the thread that steps the engine (through `Driver`).
Requests are made by `octavo.frontend`, loading is `octavo.loading`'s work.
"""

from __future__ import annotations

import dataclasses
import math
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

from octavo.backends.driver import Driver
from octavo.errors import ClosedError, InvalidInputError
from octavo.explanation import explain
from octavo.frontend import Frontend
from octavo.generation import Generation, Inbox, TextStream
from octavo.load_facts import load_facts, load_notices
from octavo.loading import PlannedModel, load_backend, plan_model
from octavo.output_filter import OutputFilter, load_filter
from octavo.settings import (
    ActivationsName,
    DtypeName,
    IsaName,
    KVDtypeName,
    QuantName,
    RunnerName,
    SamplingParams,
    Settings,
    SpeculationName,
)
from octavo.text.answer import AnswerForm
from octavo.types import (
    Completion,
    LoadState,
    Message,
    Progress,
    Request,
    Sampling,
    Score,
    TextEvent,
    Tool,
    ToolChoice,
)
from octavo.validate import split_prompts, validate_text

Prompt = str | Sequence[int]
"""A raw continuation, or token ids taken as they are."""


class LLM:
    """A loaded model. Close it (or use `with`) to give its memory back.

    `LLM()` is the default model; `model` is a hub id, a folder of safetensors, or a .gguf file. The other
    arguments are the fields of `Settings`; `filter` may also be the function itself (`octavo.output_filter`).
    Thread-safe: several threads may generate at once.

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
        activations: ActivationsName = "int16",
        kv_dtype: KVDtypeName = "auto",
        deterministic: bool = False,
        context: int | None = None,
        max_sequences: int | None = None,
        speculation: SpeculationName = "auto",
        threads: int | None = None,
        offline: bool = False,
        cache_dir: str | Path | None = None,
        cache: bool = True,
        filter: str | OutputFilter | None = None,
        progress: Progress | None = None,
    ) -> None:
        started = time.perf_counter()
        self._planned: PlannedModel | None = None
        self._packed_from_cache: bool | None = None
        self._load_seconds: float | None = None
        self._state: LoadState = "initializing"
        settings = Settings(
            model=None if model is None else str(model),
            revision=revision,
            quant=quant,
            device=device,
            dtype=dtype,
            runner=runner,
            isa=isa,
            activations=activations,
            kv_dtype=kv_dtype,
            deterministic=deterministic,
            context=context,
            max_sequences=max_sequences,
            speculation=speculation,
            threads=threads,
            offline=offline,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            cache=cache,
            filter=filter if isinstance(filter, str) else None,
        )
        output_filter = load_filter(filter) if isinstance(filter, str) else filter
        planned = plan_model(settings, progress=progress)
        source = planned.source
        self._frontend = Frontend(
            source,
            vocab_size=planned.spec.vocab_size,
            context_tokens=planned.plan.context.tokens,
            output_filter=output_filter,
        )
        # Nothing is read once it is loaded: with them the checkpoint's files would stay mapped.
        self._planned = dataclasses.replace(planned, source=dataclasses.replace(source, tensors={}))
        grammars = self._frontend.grammars
        loaded = load_backend(
            planned,
            compile_grammar=None if grammars is None else grammars.constraint,
            progress=progress,
            on_state=self._enter,
        )
        self.notices = load_notices(planned, self._frontend.notices, loaded)
        """What the user should know of the load: a cache entry made again, memory nearly used up."""
        self._packed_from_cache = loaded.packed_from_cache
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

        A string is continued as it is, without chat template; a sequence of ints is token ids. With
        `params.n` > 1 a completion is the first of its `choices`. Raises EmptyPromptError, NotTextError,
        ContextLengthError, InvalidParameterError, InvalidGrammarError, and NumericalError where the model's
        logits were not finite.
        """
        params = self._frontend.check_params(params)
        each, many = split_prompts(prompts)
        done = self._run([self._frontend.raw(prompt, params) for prompt in each], params.n)
        return done if many else done[0]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[TextEvent]:
        """As `generate`, a piece at a time. Abandoning the iterator cancels the request.

        With `params.n` > 1 the choices' events come mixed, each with its `choice`.
        """
        params = self._frontend.check_params(params)
        return self._stream(self._frontend.raw(prompt, params), params.n)

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Tool] | None = None,
        tool_choice: ToolChoice = "auto",
    ) -> Completion:
        """The answer to a conversation, in the model's own template.

        Text in a message never becomes a control token. With `tools` (definitions in OpenAI's form) the model is shown
        them, and the completion has its `tool_calls` and `reasoning` apart from its `text`; `tool_choice` as in
        OpenAI's API: "none" shows no tools, "required" and the name of a function hold the answer to calls that follow
        their schemas. Raises ChatTemplateError where the model has no template, UnsupportedParameterError where it
        cannot be shown tools or its calls cannot be told from text, and what `generate` raises.
        """
        params = self._frontend.check_params(params)
        use = self._frontend.tool_use(tools, tool_choice)
        if not use.tools:
            return self._run([self._frontend.chat(messages, params)], params.n)[0]
        generation, form = self._frontend.answer(messages, params, use=use)
        return _in_parts(self._run([generation], params.n)[0], form)

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None
    ) -> Iterator[TextEvent]:
        """As `chat`, a piece at a time. Abandoning the iterator cancels the request."""
        params = self._frontend.check_params(params)
        return self._stream(self._frontend.chat(messages, params), params.n)

    def score(self, text: Prompt) -> Score:
        """log p(token i+1 | tokens <= i) of a text of at least two tokens, and its perplexity."""
        ids = self._frontend.check_ids(self._frontend.prompt_ids(text), 0)
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
        tokenizer = self._frontend.require_tokenizer()
        return [] if text == "" else tokenizer.encode(validate_text(text), parse_special=False)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids; control tokens are left out."""
        return self._frontend.require_tokenizer().decode(token_ids)

    def count_chat_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens a conversation takes in the model's template, with the header of the answer."""
        return len(self._frontend.render(messages).token_ids)

    # --- facts --------------------------------------------------------------------------------------------

    @property
    def context_tokens(self) -> int:
        return self._frontend.context_tokens

    @property
    def has_chat_template(self) -> bool:
        return self._frontend.template is not None

    @property
    def state(self) -> LoadState:
        return self._state

    def _enter(self, state: LoadState) -> None:
        self._state = state

    def info(self) -> dict[str, Any]:
        """The facts of --json: what runs, where and how, counters since the start, memory by part in bytes."""
        if self._planned is None:
            return {"state": self._state}
        plan, source = self._planned.plan, self._planned.source
        running = self._driver.backend.info() if self._state == "ready" else {}
        return {
            "state": self._state,
            "model": source.location,
            "revision": source.revision,
            **load_facts(self._planned),
            "context_tokens": plan.context.tokens,
            "max_sequences": plan.config.max_slots,
            "packed_from_cache": self._packed_from_cache,
            "load_seconds": self._load_seconds,
            "memory": dict(running.get("memory", {})),
            "card": running.get("card"),
            "compiled": dict(running.get("compiled", {})),
            "engine": dict(running.get("engine", {})),
        }

    def explain(self) -> dict[str, Any]:
        """What runs where and why, what was considered and declined, and what was counted since the start.

        Raises ClosedError after `close`.
        """
        if self._state != "ready":
            raise ClosedError(f"the model is {self._state}", remedy="Load it again: LLM(...).")
        assert self._planned is not None
        return explain(self._planned, self._driver.backend.info())

    def close(self) -> None:
        """End what is running with ClosedError and give all memory back. Idempotent."""
        if self._state != "closed":
            self._state = "draining"
        self._driver.close()
        self._state = "closed"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- from a request to its text -------------------------------------------------------------------------

    def _stream(self, generation: Generation, n: int) -> TextStream:
        """Submits now, so that errors come from the call and not from the first `next`."""
        events = Inbox()
        running: dict[int, Generation] = {}
        try:
            for choice in generation.of_choices(n):
                running[self._driver.submit(choice.begin(), events.put)] = choice
        except BaseException:
            TextStream(running, events, self._driver.cancel).close()
            raise
        return TextStream(running, events, self._driver.cancel)

    def _run(self, generations: Sequence[Generation], n: int) -> list[Completion]:
        """All requests at once; one that fails ends the others too, since its caller gets no result."""
        events = Inbox()
        running: dict[int, Generation] = {}
        places: dict[Generation, tuple[int, int]] = {}
        done: dict[tuple[int, int], Completion] = {}
        try:
            for place, generation in enumerate(generations):
                for choice in generation.of_choices(n):
                    running[self._driver.submit(choice.begin(), events.put)] = choice
                    places[choice] = place, choice.choice
            while running:
                event, came_at = events.get()
                if event.request_id not in running:
                    continue  # it had met its stop string
                generation = running[event.request_id]
                completion = generation.accept(event, came_at).completion
                if completion is not None:
                    done[places[generation]] = completion
                    del running[event.request_id]
                    self._driver.cancel(event.request_id)
        finally:
            for request_id in running:
                self._driver.cancel(request_id)
        return [
            dataclasses.replace(done[place, 0], others=tuple(done[place, choice] for choice in range(1, n)))
            for place in range(len(generations))
        ]


def _in_parts(done: Completion, form: AnswerForm) -> Completion:
    """What the answer says, what it thought and whom it calls."""
    said = form.read(done.text)
    return dataclasses.replace(
        done,
        text=said.content,
        reasoning=said.reasoning,
        tool_calls=said.tool_calls(),
        others=tuple(_in_parts(other, form) for other in done.others),
    )
