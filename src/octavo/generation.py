"""One request on its way back: token events become text, a Completion, and honest timings.

Reads events; it does not know the engine, only how to ask for a request to be stopped.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from octavo.errors import ClosedError
from octavo.output_filter import FilteredText, OutputFilter
from octavo.text.detokenizer import Detokenizer
from octavo.text.stop_strings import StopStrings
from octavo.text.tokenizer import Tokenizer
from octavo.types import (
    Completion,
    FinishReason,
    Request,
    TextEvent,
    Timings,
    TokenEvent,
    TokenLogprob,
    Usage,
)


class Inbox:
    """Events as they come, each with the time it came: a reader that is late or slow does not change timings."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._events: queue.SimpleQueue[tuple[TokenEvent, float]] = queue.SimpleQueue()

    def put(self, event: TokenEvent) -> None:
        self._events.put((event, self._clock()))

    def get(self) -> tuple[TokenEvent, float]:
        """Waits for the next event; (event, seconds by the clock when it came)."""
        return self._events.get()


class Generation:
    """Accumulates one request's events. Not thread-safe: one reader.

    `continuation`: the text goes on from the prompt's, so a SentencePiece model's first space is part of it.
    `shown`: control tokens that are spelled out, for a parser of answers to find.
    Without a tokenizer (a folder that has none) the text stays empty.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer | None,
        stop: Sequence[str],
        *,
        continuation: bool = False,
        shown: frozenset[int] = frozenset(),
        notices: tuple[str, ...] = (),
        output_filter: OutputFilter | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._stop = stop
        self._continuation = continuation
        self._shown = shown
        self._notices = notices
        self._output_filter = output_filter
        self._filtered = None if output_filter is None else FilteredText(output_filter)
        self._detokenizer = (
            None if tokenizer is None else Detokenizer(tokenizer, continuation=continuation, shown=shown)
        )
        self._stops = StopStrings(stop)
        self._clock = clock
        self._submitted = 0.0
        self._first: float | None = None
        self._last = 0.0
        self._queued_seconds = 0.0
        self._cached_tokens = 0
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: tuple[TokenLogprob, ...] | None = None

    def of_choices(self, n: int) -> tuple[Generation, ...]:
        """This one, which is the first choice, and fresh ones for the others; prompt logprobs are asked for once."""
        return (self, *(self._choice(choice) for choice in range(1, n)))

    def _choice(self, choice: int) -> Generation:
        sampling = replace(self._request.sampling, choice=choice)
        return Generation(
            replace(self._request, sampling=sampling, prompt_logprobs=None),
            self._tokenizer,
            self._stop,
            continuation=self._continuation,
            shown=self._shown,
            notices=self._notices,
            output_filter=self._output_filter,
            clock=self._clock,
        )

    @property
    def choice(self) -> int:
        return self._request.sampling.choice

    def begin(self) -> Request:
        """The request, which is submitted now: timings start here."""
        self._submitted = self._last = self._clock()
        return self._request

    def accept(self, event: TokenEvent, came_at: float) -> TextEvent:
        """The text this event adds; the last one carries the Completion. Raises the event's error.

        `came_at`: by the clock, in seconds.
        """
        if event.error is not None:
            raise event.error
        if event.finish_reason is FinishReason.CANCELLED:
            raise ClosedError("the request was cancelled", remedy="Send it again.")
        if event.prompt_logprobs is not None:
            self._prompt_logprobs = event.prompt_logprobs
        token_ids = self._note_token(event, came_at)
        text = ""
        reason: FinishReason | None = event.finish_reason
        # Not every last token is a stop token: a grammar may end with its last character.
        if event.token_id is not None and event.token_id not in self._request.stop_token_ids:
            text, stop = self._stops.push(self._decode(event.token_id))
            reason = reason if stop is None else FinishReason.STOP
        if event.finish_reason is not None and reason is event.finish_reason:
            rest, reason = self._finish_text(reason)
            text += rest
        if self._filtered is not None:
            text, ended = self._filtered.push(text, last=reason is not None)
            reason = FinishReason.CONTENT_FILTER if ended else reason
        self._text.append(text)
        done = None if reason is None else self._completion(reason, came_at)
        return TextEvent(text, token_ids, reason, done, self.choice)

    def _note_token(self, event: TokenEvent, came_at: float) -> tuple[int, ...]:
        if event.token_id is None:
            return ()
        if self._first is None:
            self._first = came_at
            self._queued_seconds = event.queued_seconds
            self._cached_tokens = event.cached_tokens
        self._last = came_at
        self._token_ids.append(event.token_id)
        if event.logprob is not None:
            self._logprobs.append(event.logprob)
        return (event.token_id,)

    def _decode(self, token_id: int) -> str:
        return "" if self._detokenizer is None else self._detokenizer.push(token_id)

    def _finish_text(self, reason: FinishReason) -> tuple[str, FinishReason]:
        """What was held back; a stop string may still be complete in it."""
        rest, stop = ("", None) if self._detokenizer is None else self._stops.push(self._detokenizer.finish())
        if stop is None:
            last, stop = self._stops.finish()
            rest += last
        return rest, reason if stop is None else FinishReason.STOP

    def _completion(self, reason: FinishReason, ended_at: float) -> Completion:
        request = self._request
        return Completion(
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            finish_reason=reason,
            prompt_token_ids=request.prompt_token_ids,
            usage=Usage(len(request.prompt_token_ids), len(self._token_ids), self._cached_tokens),
            timings=self._timings(ended_at),
            seed=request.sampling.seed,
            logprobs=tuple(self._logprobs) if request.sampling.logprobs is not None else None,
            prompt_logprobs=self._prompt_logprobs,
            notices=(*self._notices, *(() if self._filtered is None else self._filtered.notices)),
            choice=request.sampling.choice,
        )

    def _timings(self, ended_at: float) -> Timings:
        first = None if self._first is None else self._first - self._submitted
        prefill = None if first is None else first - self._queued_seconds
        prompt_tokens = len(self._request.prompt_token_ids) - self._cached_tokens
        later, spent = len(self._token_ids) - 1, self._last - (self._first or self._last)
        return Timings(
            queued_seconds=self._queued_seconds,
            first_token_seconds=first,
            total_seconds=ended_at - self._submitted,
            prefill_tokens_per_second=prompt_tokens / prefill if prefill else None,
            decode_tokens_per_second=later / spent if later > 0 and spent > 0 else None,
        )


class TextStream(Iterator[TextEvent]):
    """The text of one or several choices as it comes. Closing it, or dropping it unread, cancels what still runs.

    `generations`: by the id their requests were given.
    """

    def __init__(
        self, generations: Mapping[int, Generation], events: Inbox, cancel: Callable[[int], None]
    ) -> None:
        self._running = dict(generations)
        self._events = events
        self._cancel = cancel

    def __next__(self) -> TextEvent:
        if not self._running:
            raise StopIteration
        try:
            while (generation := self._running.get((arrived := self._events.get())[0].request_id)) is None:
                pass  # it had met its stop string
            event = generation.accept(*arrived)
        except BaseException:  # KeyboardInterrupt too: the requests must not go on unread
            self.close()
            raise
        if event.completion is not None:
            self._end(arrived[0].request_id)
        return event

    def close(self) -> None:
        """Stop what still runs. Idempotent."""
        for request_id in list(self._running):
            self._end(request_id)

    def _end(self, request_id: int) -> None:
        del self._running[request_id]
        self._cancel(request_id)

    def __del__(self) -> None:
        self.close()
