"""The step loop: takes requests, lets the scheduler plan a step, queues it on the runner, reads tokens back.

While a device still works on step n, step n + 1 is queued behind it: its decode tokens are already on the
device. A sequence may end in step n; its part of step n + 1 is then surplus, never emitted or counted, and
its slot and pages are given back once that step is done too. A runner that computes before it returns is
never run ahead of. A fault in one request ends that request only. What to schedule is scheduler.py's.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from octavo.engine.scheduler import Entry, Scheduler
from octavo.engine.sequence import Sequence
from octavo.engine.step import Step, queue_step
from octavo.errors import ClosedError, ContextLengthError, EmptyPromptError, NumericalError
from octavo.models.spec import ModelSpec
from octavo.runners.base import Chunk, ForwardResult, Runner, RunnerConfig, Sampled
from octavo.types import FinishReason, Request, TokenEvent, TokenLogprob


class Engine:
    """Runs requests on a runner, which it owns. `submit`, `cancel`, `info` and `close` are thread-safe; one
    thread calls `step`.

    `weights_digest` identifies weights and format (the root of prefix keys). `clock` counts seconds.
    """

    def __init__(
        self,
        runner: Runner,
        config: RunnerConfig,
        spec: ModelSpec,
        weights_digest: str,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._runner = runner
        self._weights_digest = weights_digest
        self._scheduler = Scheduler(
            spec.kv_groups, config.kv_pages, config.max_slots, config.prefill_chunk_tokens
        )
        self._context_tokens = self._scheduler.longest_tokens(config.context_tokens)

        self._clock = clock

        self._ids = itertools.count()
        self._mail = threading.Condition()
        """Guards what other threads leave for the next step: `_submitted`, `_closed`."""
        self._submitted: list[Sequence] = []
        self._closed = False
        self._cancelled: SimpleQueue[int] = SimpleQueue()
        """Without a lock: an abandoned stream cancels from its destructor, which may run wherever the garbage
        collector does, in a thread that holds one of ours. SimpleQueue.put is reentrant."""

        self._work = threading.Lock()
        """Guards everything below and the runner; held for a step's work, not while waiting for some."""
        self._live: dict[int, Sequence] = {}
        self._in_flight: Step | None = None
        self._events: list[TokenEvent] = []
        self._released = False
        self._steps = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._surplus_tokens = 0
        self._faults = 0

    @property
    def context_tokens(self) -> int:
        """Longest sequence, prompt and new tokens together: the context, or less where the pages hold less."""
        return self._context_tokens

    def submit(self, request: Request) -> int:
        """Queue a request; returns its id.

        Raises EmptyPromptError, ContextLengthError where prompt and new tokens exceed `context_tokens`, and
        ClosedError after `close`.
        """
        prompt_tokens = len(request.prompt_token_ids)
        if not prompt_tokens:
            raise EmptyPromptError(
                "the prompt has no tokens", remedy="Give at least one token, e.g. the model's BOS."
            )
        if prompt_tokens + request.max_new_tokens > self._context_tokens:
            raise ContextLengthError(
                f"a prompt of {prompt_tokens} tokens and {request.max_new_tokens} new ones exceed "
                f"the context of {self._context_tokens} tokens",
                remedy="Shorten the prompt, lower --max-new-tokens or raise --context.",
                prompt_tokens=prompt_tokens,
                context_tokens=self._context_tokens,
            )
        sequence = Sequence(next(self._ids), request, self._clock())
        with self._mail:
            if self._closed:
                raise ClosedError("the engine is closed", remedy="Load the model again.")
            self._submitted.append(sequence)
            self._mail.notify()
        return sequence.request_id

    def cancel(self, request_id: int) -> None:
        """End a request at the next step. No effect where it has ended or never was. Takes no lock."""
        if not self._closed:
            self._cancelled.put(request_id)  # wakes nobody: while there is a request to cancel, steps go on

    def step(self, timeout_seconds: float) -> list[TokenEvent]:
        """Do one step of work, waiting at most `timeout_seconds` for some to arrive; [] when there was none."""
        with self._mail:
            if not (self._live or self._in_flight):
                self._mail.wait_for(lambda: self._submitted or self._closed, timeout_seconds)
        with self._work:
            if not self._released:
                self._collect_mail()
                self._advance()
            events, self._events = self._events, []
            return events

    def info(self) -> dict[str, Any]:
        """Counters since the start, sequences now, and the runner's memory and counters."""
        with self._work:
            return {
                "weights_digest": self._weights_digest,
                "context_tokens": self._context_tokens,
                "steps": self._steps,
                "prompt_tokens": self._prompt_tokens,
                "generated_tokens": self._generated_tokens,
                "surplus_tokens": self._surplus_tokens,
                "faults": self._faults,
                "waiting": self._scheduler.waiting + len(self._submitted),
                "running": self._scheduler.active,
                "memory": {} if self._released else dict(self._runner.memory()),
                "compiled": self._runner.counters(),
            }

    def check(self) -> None:
        """Raise AssertionError unless every page and slot is free or held by one live request."""
        with self._work:
            self._scheduler.check()

    def close(self) -> None:
        """End every request with a ClosedError event, which the next `step` returns, and close the runner.
        Waits for the step in flight. Idempotent."""
        with self._mail:
            self._closed = True
            self._mail.notify_all()
        with self._work:
            if self._released:
                return
            self._released = True
            self._collect_mail()
            self._abandon(self._take_in_flight())
            error = ClosedError("the engine was closed during this request", remedy="Load the model again.")
            for sequence in list(self._live.values()):
                self._finish(sequence, FinishReason.ERROR, error=error)
            self._runner.close()

    # --- one step ----------------------------------------------------------------------------------

    def _collect_mail(self) -> None:
        # Before the submitted ones: who is cancelled here is among them at the latest.
        cancelled = [self._cancelled.get_nowait() for _ in range(self._cancelled.qsize())]
        with self._mail:
            submitted, self._submitted = self._submitted, []
        for sequence in submitted:
            self._live[sequence.request_id] = sequence
            self._scheduler.add(sequence)
        for request_id in cancelled:
            if request_id in self._live:
                self._finish(self._live[request_id], FinishReason.CANCELLED)

    def _advance(self) -> None:
        step = self._in_flight or self._queue_next()
        # Read a step that is done before planning the next: who has ended is then known, nothing is surplus.
        self._in_flight = self._queue_next() if step is not None and not step.done() else None
        if step is not None:
            self._read(step)

    def _queue_next(self) -> Step | None:
        for sequence in self._scheduler.admit():
            sequence.queued_seconds = self._clock() - sequence.submitted_at
            self._fail_on(self._open_slot(sequence), sequence)
        entries = self._scheduler.plan()
        return self._queue(entries) if entries else None

    def _open_slot(self, sequence: Sequence) -> Exception | None:
        assert sequence.slot is not None
        try:
            self._runner.open_slot(sequence.slot, sequence.slot_state())
        except Exception as error:
            return error
        return None

    def _close_slot(self, sequence: Sequence) -> Exception | None:
        assert sequence.slot is not None
        try:
            self._runner.close_slot(sequence.slot)
        except Exception as error:
            return error
        return None

    def _queue(self, entries: list[Entry]) -> Step:
        self._steps += 1
        return queue_step(self._runner, entries)

    def _read(self, step: Step) -> None:
        try:
            results = step.wait()
        except Exception as error:
            # Its frames would keep the failed step's memory alive while its chunks run again.
            error.__traceback__ = None
            results = None
        if results is None:
            self._isolate(step.entries)
        else:
            self._apply(step.entries, *results)

    def _apply(
        self, entries: list[Entry], forward: ForwardResult, tokens: tuple[tuple[Sampled, ...], ...]
    ) -> None:
        """Turn a step's results into events, in the order of its chunks."""
        sampled = iter(tokens)
        for (sequence, chunk), prompt_logprobs in zip(entries, forward.prompt_logprobs, strict=True):
            (token,) = next(sampled) if chunk.sample else (None,)
            sequence.computed_tokens += chunk.tokens
            if sequence.finish_reason is not None:
                self._surplus_tokens += chunk.tokens
                if not sequence.in_flight:
                    self._give_back(sequence)
                continue
            if chunk.token_ids is not None:
                self._prompt_tokens += chunk.tokens
            if prompt_logprobs:
                if any(math.isnan(entry.logprob) for entry in prompt_logprobs):
                    self._fail_on(_not_finite(sequence, "prompt"), sequence)
                    continue
                sequence.prompt_logprobs.extend(prompt_logprobs)
            if token is not None:
                self._emit(sequence, token)
            elif sequence.computed_tokens == sequence.feed_tokens:
                self._finish(sequence, FinishReason.LENGTH)
            if sequence.finish_reason is None:
                self._scheduler.free_leaving_pages(sequence)

    def _emit(self, sequence: Sequence, sampled: Sampled) -> None:
        if sampled.token_id < 0:
            self._fail_on(_not_finite(sequence, "next token"), sequence)
            return
        request = sequence.request
        sequence.token_ids.append(sampled.token_id)
        self._generated_tokens += 1
        if sampled.token_id in request.stop_token_ids:
            self._finish(sequence, FinishReason.STOP, sampled)
        elif sequence.generated_tokens == request.max_new_tokens:
            self._finish(sequence, FinishReason.LENGTH, sampled)
        else:
            self._events.append(_event(sequence, sampled))

    # --- how a request ends ------------------------------------------------------------------------

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        sampled: Sampled | None = None,
        error: Exception | None = None,
    ) -> None:
        """Emit a request's last event; its slot and pages go back now, or with its last step in flight."""
        was_waiting = sequence.slot is None
        sequence.finish_reason = reason
        del self._live[sequence.request_id]
        self._events.append(_event(sequence, sampled, error))
        if was_waiting:
            self._scheduler.drop(sequence)
        elif not sequence.in_flight:
            self._give_back(sequence)

    def _fail_on(self, error: Exception | None, sequence: Sequence) -> None:
        """End a request where there was an error."""
        if error is not None:
            self._faults += 1
            self._finish(sequence, FinishReason.ERROR, error=error)

    def _give_back(self, sequence: Sequence) -> None:
        if not self._released and self._close_slot(sequence) is not None:
            # The request has ended; whoever gets the slot next opens it anew, and fails if that fails.
            self._faults += 1
        self._scheduler.release(sequence)

    # --- faults ------------------------------------------------------------------------------------

    def _isolate(self, failed: list[Entry]) -> None:
        """A batch raised: run its chunks again, one sequence at a time, so that only those at fault fail.

        Keys and values before a chunk are intact and its own are written again; slots are rebuilt, since
        sampling may have moved them on. A step queued behind the failed one is dropped and planned again.
        """
        self._faults += 1
        behind = self._take_in_flight()
        self._abandon([*failed, *behind])
        rerun = set()
        for sequence, chunk in failed:
            rerun.add(sequence)
            if sequence.finish_reason is None:
                error = self._rebuild_slot(sequence) or self._run_alone(sequence, chunk)
                self._fail_on(error, sequence)
        for sequence, _ in behind:
            if sequence.finish_reason is None and sequence not in rerun:
                self._fail_on(self._rebuild_slot(sequence), sequence)

    def _take_in_flight(self) -> list[Entry]:
        """Wait for the step in flight, whose results are not wanted; returns its entries."""
        step, self._in_flight = self._in_flight, None
        if step is None:
            return []
        step.settle()
        return step.entries

    def _abandon(self, entries: list[Entry]) -> None:
        """Rewind sequences whose steps are over without results, and give back what the ended ones hold."""
        for sequence, _ in entries:
            sequence.rewind()
            if sequence.finish_reason is not None and sequence.slot is not None:
                self._give_back(sequence)

    def _rebuild_slot(self, sequence: Sequence) -> Exception | None:
        return self._close_slot(sequence) or self._open_slot(sequence)

    def _run_alone(self, sequence: Sequence, chunk: Chunk) -> Exception | None:
        sequence.requeue(chunk)
        entries = [(sequence, chunk)]
        try:
            forward, tokens = self._queue(entries).wait()
        except Exception as error:
            sequence.rewind()
            return error
        self._apply(entries, forward, tokens)
        return None


def _event(sequence: Sequence, sampled: Sampled | None, error: Exception | None = None) -> TokenEvent:
    token_id, logprob = (sampled.token_id, sampled.logprob) if sampled is not None else (None, None)
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    if sequence.request.prompt_logprobs is not None and _ends_prefill(sequence, sampled):
        prompt_logprobs = tuple(sequence.prompt_logprobs)
    is_first = sequence.generated_tokens == (0 if sampled is None else 1)
    return TokenEvent(
        request_id=sequence.request_id,
        token_id=token_id,
        logprob=logprob,
        finish_reason=sequence.finish_reason,
        error=error,
        prompt_logprobs=prompt_logprobs,
        queued_seconds=sequence.queued_seconds if is_first else 0.0,
    )


def _ends_prefill(sequence: Sequence, sampled: Sampled | None) -> bool:
    if sampled is None:
        return sequence.finish_reason is FinishReason.LENGTH
    return sequence.generated_tokens == 1


def _not_finite(sequence: Sequence, what: str) -> NumericalError:
    return NumericalError(
        f"the logits of request {sequence.request_id} for its {what} are not finite "
        f"(position {len(sequence.token_ids)})",
        remedy="Try --dtype float32; if it persists, the checkpoint or its quantization is damaged.",
    )
