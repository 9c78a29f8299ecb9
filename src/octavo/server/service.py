"""What all routes share: the models, the queue, the settings; and the way from a request to running sequences."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from octavo.errors import ClosedError
from octavo.server.admission import Admission
from octavo.server.exchange import Exchange
from octavo.server.faults import unavailable
from octavo.server.metrics import Metrics
from octavo.server.models import Models, Resident
from octavo.server.prepare import Prepared, may_compile
from octavo.server.running import Piece, Running
from octavo.server.schema import ChatRequest, CompletionRequest, ModelT, read
from octavo.server.settings import ServerSettings
from octavo.server.tokens_json import reasoning_tokens
from octavo.server.worker_link import WorkerLostError
from octavo.version import __version__

RequestT = TypeVar("RequestT", ChatRequest, CompletionRequest)

_PREPARING_THREADS = 4


class Service:
    """One a server. Everything here happens on the loop but `prepare`, which has threads of its own."""

    def __init__(self, settings: ServerSettings, models: Models) -> None:
        self.settings = settings
        self.models = models
        self.queue = Admission(settings.max_queue, settings.max_queue_tokens)
        self.metrics = Metrics()
        self.started = int(time.time())
        self.draining = False
        self._threads = ThreadPoolExecutor(_PREPARING_THREADS, thread_name_prefix="octavo-prepare")
        self._compiling = ThreadPoolExecutor(_PREPARING_THREADS, thread_name_prefix="octavo-compile")
        """For requests that may wait seconds for a grammar: they hold up only each other."""

    async def read(self, exchange: Exchange, cls: type[ModelT]) -> tuple[ModelT, bytes]:
        """The request, and its body's bytes; what has no effect is in the answer's header. Raises HttpFault."""
        values, body = await exchange.json()
        request, without_effect = read(cls, values)
        self.note_ignored(exchange, without_effect)
        return request, body

    @contextlib.asynccontextmanager
    async def running(
        self,
        exchange: Exchange,
        name: str,
        body: bytes,
        request: RequestT,
        prepare: Callable[[RequestT, Resident, ServerSettings, str], Prepared],
    ) -> AsyncIterator[tuple[Resident, Prepared, Running]]:
        """Admit, load, prepare and submit; cancels what still runs afterwards.

        Raises what each of these raises, all of it before an answer has begun.
        """
        if self.draining:
            raise unavailable("the server is shutting down", "shutting_down", 10)
        served = self.models.find(name)
        digest = hashlib.sha256(body).digest()
        self.models.suspects.check(digest)
        exchange.facts["model"] = served.name
        place = self.queue.enter(1, 0)  # it waits from here on, for the model's load too
        try:
            async with self.models.use(served.name, self.settings.queue_seconds) as model:
                threads = self._compiling if may_compile(request) else self._threads
                prepared = await asyncio.get_running_loop().run_in_executor(
                    threads, prepare, request, model, self.settings, exchange.key_id
                )
                place.leave()
                place = self.queue.enter(len(prepared.requests), prepared.prompt_tokens)
                running = Running(
                    model.link,
                    prepared.generations,
                    prepared.requests,
                    queue=self.queue,
                    place=place,
                    queue_seconds=self.settings.queue_seconds,
                    request_seconds=self.settings.request_seconds,
                )
                try:
                    async with running:
                        yield model, prepared, running
                except (WorkerLostError, ClosedError):
                    self.models.suspects.blame(digest, model.link.pid or 0)
                    raise
                finally:
                    self._note(exchange, running)
        finally:
            place.leave()

    async def in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def close(self) -> None:
        for threads in (self._threads, self._compiling):
            threads.shutdown(wait=False, cancel_futures=True)

    def note_ignored(self, exchange: Exchange, names: Sequence[str]) -> None:
        if names:
            exchange.add_header("x-octavo-ignored", ", ".join(names))

    def _note(self, exchange: Exchange, running: Running) -> None:
        timing = running.timing
        if timing.first_token is not None:
            exchange.facts["queued_seconds"] = round(timing.queued_seconds, 4)
            exchange.facts["first_token_seconds"] = round(timing.first_token, 4)
            self.metrics.first_token.observe(timing.first_token)
            self.metrics.queued.observe(timing.queued_seconds)


def usage_of(prepared: Prepared, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Prompts count once, whatever n is; tokens of all choices count."""
    done = [piece.completion for piece in pieces if piece.completion is not None]
    prompt = sum(len(each.prompt_token_ids) for each in prepared.requests[:: prepared.n])
    completion = sum(each.usage.completion_tokens for each in done)
    cached = sum(
        piece.completion.usage.cached_tokens
        for piece in pieces
        if piece.completion and piece.index % prepared.n == 0
    )
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    if prepared.form.thinks and prepared.tokenizer is not None:
        thought = sum(reasoning_tokens(prepared.tokenizer, prepared.form, each.token_ids) for each in done)
        usage["completion_tokens_details"] = {"reasoning_tokens": thought}
    return usage


def fingerprint(model: Resident) -> str:
    """Changes when the answers to the same seed may: with the version, the weights, the runner."""
    facts = f"{model.ready.fingerprint} {model.ready.facts.get('quant')} {model.ready.facts.get('runner')}"
    return f"octavo-{__version__}-{hashlib.sha256(facts.encode()).hexdigest()[:10]}"
