"""The sequences of one HTTP request on their way back: events as they come, made into text, merged where they wait.

A reader that is slow gets larger pieces, not more of them: what waits is events, a few words each, and never more
than the context has tokens. Leaving `Running` cancels what still runs. SSE and JSON are the routes' work.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from octavo.errors import OctavoError
from octavo.generation import Generation
from octavo.server.admission import Admission, Place
from octavo.server.faults import HttpFault
from octavo.server.worker_link import Sink, WorkerLink
from octavo.types import Completion, FinishReason, Request, TokenEvent, TokenLogprob


@dataclass(slots=True)
class Piece:
    """What is new of one sequence since the last piece."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    completion: Completion | None = None
    """On the last one."""

    @property
    def is_empty(self) -> bool:
        return not (self.text or self.logprobs or self.completion or self.prompt_logprobs)


@dataclass(slots=True)
class Timing:
    """Seconds since the request was submitted; None: not yet."""

    started: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    queued_seconds: float = 0.0


class Running:
    """Sequences submitted together. Use as an async context manager, and iterate once.

    `requests` are the generations' own, with what the API adds (prompt logprobs, salt).
    """

    def __init__(
        self,
        link: WorkerLink,
        generations: Sequence[Generation],
        requests: Sequence[Request],
        *,
        queue: Admission,
        place: Place,
        queue_seconds: float,
        request_seconds: float,
    ) -> None:
        self._link = link
        self._generations = generations
        self._requests = requests
        self._queue = queue
        self._place = place
        self._queue_seconds = queue_seconds
        self._request_seconds = request_seconds
        self._events: list[tuple[int, TokenEvent, float]] = []
        self._news = asyncio.Event()
        self._deadline: asyncio.TimerHandle | None = None
        self._late = False
        self._keys: dict[int, int] = {}
        self._begun: set[int] = set()
        self.timing = Timing()

    async def __aenter__(self) -> Running:
        self._end_after(min(self._queue_seconds, self._request_seconds))
        try:
            for index, request in enumerate(self._requests):
                self._keys[index] = self._link.submit(request, self._sink(index))
        except BaseException:
            self._cancel()
            raise
        return self

    async def __aexit__(self, *about: object) -> None:
        self._cancel()

    def _sink(self, index: int) -> Sink:
        def take(event: TokenEvent) -> None:
            self._events.append((index, event, time.perf_counter()))
            self._news.set()

        return take

    def _end_after(self, limit_seconds: float) -> None:
        """Of all the time since it was submitted. One timer for many tokens: each would cost more than its text."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._late = False
        left = self.timing.started + limit_seconds - time.perf_counter()
        self._deadline = asyncio.get_running_loop().call_later(max(0.0, left), self._expire)

    def _expire(self) -> None:
        self._late = True
        self._news.set()

    def _cancel(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        for key in self._keys.values():
            self._link.cancel(key)
        self._keys.clear()
        self._place.leave()

    async def __aiter__(self) -> AsyncIterator[list[Piece]]:
        """What is new, sequence by sequence, until all have ended.

        Raises the first error of any sequence, after what came before it, and HttpFault 504 where one takes
        longer than it may.
        """
        while self._keys:
            await self._wait()
            pieces, error = self._news_of()
            if pieces:
                yield pieces
            if error is not None:
                raise error

    def _news_of(self) -> tuple[list[Piece], Exception | None]:
        events, self._events = self._events, []
        self._news.clear()
        pieces: dict[int, Piece] = {}
        for index, event, came_at in events:
            if index not in self._keys:
                continue
            piece = pieces.get(index) or Piece(index)
            try:
                self._take(piece, event, came_at)
            except Exception as error:
                return list(pieces.values()), error
            pieces[index] = piece
        return list(pieces.values()), None

    async def _wait(self) -> None:
        if not (self._events or self._late):
            await self._news.wait()
        if not self._events:
            # Of many sequences the last may have to wait for the first to end: that is no queue.
            limit = self._request_seconds if self._begun else min(self._queue_seconds, self._request_seconds)
            what = "took longer than it may" if self._begun else "waited too long for its first token"
            raise HttpFault(
                504, f"the request {what} ({limit:g} s)", "deadline_exceeded", "server_error", retry=False
            )

    def _take(self, piece: Piece, event: TokenEvent, came_at: float) -> None:
        index = piece.index
        if index not in self._begun:
            self._begin(index, event, came_at)
        if event.prompt_logprobs is not None:
            piece.prompt_logprobs = event.prompt_logprobs
        made = self._generations[index].accept(event, came_at)
        piece.text += made.text
        piece.token_ids += made.token_ids
        if event.logprob is not None and event.finish_reason is not FinishReason.STOP:
            piece.logprobs.append(event.logprob)
        if made.completion is not None:
            piece.completion = made.completion
            self._link.cancel(self._keys.pop(index))

    def _begin(self, index: int, event: TokenEvent, came_at: float) -> None:
        if not self._begun:
            self._end_after(self._request_seconds)
        self._begun.add(index)
        self._place.leave(1)
        if self.timing.first_token is None and event.error is None:
            self.timing.first_token = came_at - self.timing.started
            self.timing.queued_seconds = event.queued_seconds
            self._queue.note_wait(self.timing.first_token)


async def collect(running: Running, count: int) -> list[Piece]:
    """All of it, one whole piece a sequence."""
    whole = [Piece(index) for index in range(count)]
    async for pieces in running:
        for piece in pieces:
            into = whole[piece.index]
            into.text += piece.text
            into.token_ids += piece.token_ids
            into.logprobs += piece.logprobs
            into.prompt_logprobs = piece.prompt_logprobs or into.prompt_logprobs
            into.completion = piece.completion
    return whole


def is_ours(error: BaseException) -> bool:
    """Whether an error of a stream may be told to the client in its own words."""
    return isinstance(error, (HttpFault, OctavoError))
