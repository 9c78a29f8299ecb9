"""The step loop: lets the scheduler plan a step, queues it on the runner, reads tokens back into events.

While a device still works on step n, step n + 1 is queued behind it: its decode tokens are already on the
device. A sequence may end in step n; its part of step n + 1 is then surplus, never emitted or counted, and
its slot and pages are given back once that step is done too. A runner that computes before it returns is
never run ahead of. A fault in one request ends that request only: a batch that raises is run again in halves
until who is at fault is alone. One thread at a time; locks and doors are engine.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from octavo.engine.compiler import GrammarCompiler
from octavo.engine.hooks import error_of_hook
from octavo.engine.scheduler import Entry, Scheduler
from octavo.engine.sequence import Sequence
from octavo.engine.speculation import may_pay
from octavo.engine.step import Results, Step, queue_forward
from octavo.errors import InvalidParameterError, NotEnoughMemoryError, NumericalError
from octavo.runners.base import Chunk, Runner, Sampled
from octavo.types import FinishReason, TokenEvent, TokenLogprob

if TYPE_CHECKING:
    import numpy as np

_NO_TOKENS: tuple[Sampled, ...] = ()

_STEPS_TO_TRUST_AGAIN = 64
"""A batch that did not fit memory halves the next ones; after so many good steps they may double."""


class StepLoop:
    """Owns the sequences it was given, until their last event; the runner is lent. `clock` counts seconds."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        *,
        compiler: GrammarCompiler | None,
        clock: Callable[[], float],
    ) -> None:
        self.live: dict[int, Sequence] = {}
        """Added and not ended, by request id."""
        self.steps = 0
        self.prompt_tokens = 0
        """Of requests whose prefill ended."""
        self.generated_tokens = 0
        self.surplus_tokens = 0
        self.proposed_drafts = 0
        self.accepted_drafts = 0
        self.faults = 0
        self._runner = runner
        self._scheduler = scheduler
        self._compiler = compiler
        self._clock = clock
        self._in_flight: Step | None = None
        self._events: list[TokenEvent] = []
        self._good_steps = 0
        """Since a batch did not fit memory."""

    @property
    def busy(self) -> bool:
        """Whether there is a step to make or to read."""
        return bool(self._scheduler.waiting or self._scheduler.active or self._in_flight)

    def add(self, sequence: Sequence) -> None:
        """Take a request in; one with a grammar waits until that is compiled."""
        self.live[sequence.request_id] = sequence
        if sequence.request.grammar is None:
            self._scheduler.add(sequence)
        else:
            assert self._compiler is not None
            self._compiler.start(sequence)

    def take_events(self) -> list[TokenEvent]:
        events, self._events = self._events, []
        return events

    # --- one step ----------------------------------------------------------------------------------

    def advance(self) -> None:
        """Queue a step, or two, and read one back."""
        if self._compiler is not None:
            self._take_compiled(self._compiler)
        step = self._in_flight
        if step is None:
            step = self._queue_next()
            if step is None:
                return
            self._queue_sample(step)
        ahead = None
        # Read a step that is done before planning the next: who has ended is then known, nothing is surplus.
        if not step.done() and not self._scheduler.wants_drain:
            self._in_flight = step
            ahead = self._queue_next()
            if ahead is not None and not ahead.lockstep:
                self._queue_sample(ahead)
        self._in_flight = ahead
        self._read(step)
        if self._in_flight is not None and self._in_flight.lockstep:
            self._queue_sample(self._in_flight)

    def _take_compiled(self, compiler: GrammarCompiler) -> None:
        for sequence, result in compiler.take_done():
            if isinstance(result, Exception):
                self.fail_on(result, sequence)
            else:
                sequence.constraint = result
                self._scheduler.add(sequence)

    def _queue_next(self) -> Step | None:
        scheduler = self._scheduler
        if scheduler.waiting:
            self._admit()
        guess = self._guess if may_pay(scheduler.active) else None
        entries = scheduler.plan(may_preempt=self._in_flight is None, guess=guess)
        for slot in scheduler.take_preempted_slots():
            if self._close_slot(slot) is not None:
                self.faults += 1
        return self._queue_forward(entries) if entries else None

    def _admit(self) -> None:
        for sequence in self._scheduler.admit():
            if sequence.queued_seconds < 0:
                sequence.queued_seconds = self._clock() - sequence.submitted_at
            self.fail_on(self._open_slot(sequence), sequence)

    def _queue_forward(self, entries: list[Entry]) -> Step:
        self.steps += 1
        return queue_forward(self._runner, entries)

    def _queue_sample(self, step: Step) -> None:
        """Queue sampling with what the host has to say of it: every token before is read back."""
        masks: dict[int, np.ndarray] = {}
        logits: dict[int, np.ndarray] = {}
        if step.lockstep:
            for sequence, chunk in step.entries:
                if chunk.sample and sequence.lockstep and sequence.finish_reason is None:
                    error = self._constrain(sequence, masks, logits)
                    if error is not None and step.failed():
                        return  # not its fault: there are no logits, as waiting for the step will tell
                    self.fail_on(error, sequence)
        step.queue_sample(self._runner, masks, logits)

    def _constrain(
        self, sequence: Sequence, masks: dict[int, np.ndarray], logits: dict[int, np.ndarray]
    ) -> Exception | None:
        assert sequence.slot is not None
        try:
            mask = None if sequence.constraint is None else sequence.constraint.mask()
            if mask is not None:
                masks[sequence.slot] = mask
            if sequence.request.logits_processors:
                logits[sequence.slot] = self._processed_logits(sequence, sequence.slot)
        except BaseException as error:
            return error_of_hook(error)
        return None

    def _processed_logits(self, sequence: Sequence, slot: int) -> np.ndarray:
        import numpy as np

        row = self._runner.logits(slot)
        shape = row.shape
        token_ids = tuple(sequence.token_ids)
        for process in sequence.request.logits_processors:
            row = np.asarray(process(token_ids, row), dtype=np.float32)
            if row.shape != shape:
                raise InvalidParameterError(
                    f"a logits processor returned an array of shape {row.shape} instead of {shape}",
                    remedy="Return one fp32 logit for each token of the vocabulary.",
                    parameter="logits_processors",
                )
        return row

    def _guess(self, sequence: Sequence, most: int, sequences: int) -> tuple[int, ...]:
        assert sequence.speculation is not None
        try:
            return sequence.speculation.guesses(sequence.token_ids, most, sequences)
        except BaseException as error:
            error_of_hook(error)
            self.faults += 1
            sequence.speculation = None  # guesses are only ever a shortcut: the request goes on without
            return ()

    def _read(self, step: Step) -> None:
        try:
            results = step.wait()
        except Exception as error:
            # Its frames would keep the failed step's memory alive while its chunks run again.
            error.__traceback__ = None
            self._isolate(step.entries, error)
            return
        self._apply(step.entries, results)
        self._good_steps += 1
        if self._good_steps == _STEPS_TO_TRUST_AGAIN:
            self._good_steps = 0
            self._scheduler.allow_more_chunks()

    def _apply(self, entries: list[Entry], results: Results) -> None:
        """Turn a step's results into events, in the order of its chunks."""
        forward, tokens = results
        sampled = iter(tokens)
        for (sequence, chunk), prompt_logprobs in zip(entries, forward.prompt_logprobs, strict=True):
            found = next(sampled) if chunk.sample else _NO_TOKENS
            if sequence.finish_reason is not None:
                sequence.computed_tokens += chunk.tokens
                self.surplus_tokens += chunk.tokens
                if not sequence.in_flight:
                    self._give_back(sequence)
                continue
            if chunk.token_ids is None:
                sequence.computed_tokens += 1
                self._emit(sequence, found[0])
            elif chunk.drafts:
                self._apply_drafts(sequence, chunk, found)
            else:
                self._apply_prefill(sequence, chunk, prompt_logprobs, found)
            if sequence.leaving_pages and sequence.finish_reason is None:
                self._scheduler.paging.free_leaving_pages(sequence)

    def _apply_prefill(
        self,
        sequence: Sequence,
        chunk: Chunk,
        prompt_logprobs: tuple[TokenLogprob, ...] | None,
        found: tuple[Sampled, ...],
    ) -> None:
        sequence.computed_tokens += chunk.tokens
        if prompt_logprobs:
            if any(math.isnan(entry.logprob) for entry in prompt_logprobs):
                self.fail_on(_not_finite(sequence, "prompt"), sequence)
                return
            sequence.prompt_logprobs.extend(prompt_logprobs)
        if sequence.computed_tokens < sequence.prefill_tokens:
            return
        if sequence.generated_tokens == 0:
            self.prompt_tokens += sequence.prompt_tokens
        if found:
            self._emit(sequence, found[0])
        else:
            self._finish(sequence, FinishReason.LENGTH)

    def _apply_drafts(self, sequence: Sequence, chunk: Chunk, found: tuple[Sampled, ...]) -> None:
        """Guesses are right as far as tokens came back; what was fed beyond is fed anew."""
        accepted = len(found) - 1
        self.proposed_drafts += chunk.drafts
        self.accepted_drafts += accepted
        if sequence.speculation is not None:
            sequence.speculation.observe(chunk.drafts, accepted, self._scheduler.active)
        for sampled in found:
            sequence.computed_tokens += 1
            sequence.queued_tokens = sequence.computed_tokens
            self._emit(sequence, sampled)
            if sequence.finish_reason is not None:
                return

    def _emit(self, sequence: Sequence, sampled: Sampled) -> None:
        token_id = sampled.token_id
        if token_id < 0:
            self.fail_on(_not_finite(sequence, "next token"), sequence)
            return
        token_ids = sequence.token_ids
        token_ids.append(token_id)
        self.generated_tokens += 1
        if sequence.computed_tokens >= sequence.publish_at:
            self._scheduler.publish(sequence)
        if token_id in sequence.stop_token_ids:
            self._finish(sequence, FinishReason.STOP, sampled)
        elif len(token_ids) > sequence.feed_tokens:
            self._finish(sequence, FinishReason.LENGTH, sampled)
        else:
            first = len(token_ids) == sequence.prompt_tokens + 1
            self._events.append(
                _event(sequence, sampled)
                if first
                else TokenEvent(sequence.request_id, token_id, sampled.logprob)
            )
            if sequence.constraint is not None:
                self._accept(sequence, token_id)

    def _accept(self, sequence: Sequence, token_id: int) -> None:
        assert sequence.constraint is not None
        try:
            sequence.constraint.accept(token_id)
            finished = sequence.constraint.finished
        except BaseException as error:
            self.fail_on(error_of_hook(error), sequence)
            return
        if finished:
            self._finish(sequence, FinishReason.STOP)

    # --- how a request ends ------------------------------------------------------------------------

    def cancel(self, request_id: int) -> None:
        """End a request; no effect where it has ended."""
        if request_id in self.live:
            self._finish(self.live[request_id], FinishReason.CANCELLED)

    def end_all(self, error: Exception) -> None:
        """End every request with an error, and wait for the step in flight."""
        self._abandon(self._take_in_flight())
        for sequence in list(self.live.values()):
            self._finish(sequence, FinishReason.ERROR, error=error)

    def fail_on(self, error: Exception | None, sequence: Sequence) -> None:
        """End a request where there was an error."""
        if error is not None:
            self.faults += 1
            self._finish(sequence, FinishReason.ERROR, error=error)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        sampled: Sampled | None = None,
        error: Exception | None = None,
    ) -> None:
        """Emit a request's last event; its slot and pages go back now, or with its last step in flight."""
        sequence.finish_reason = reason
        del self.live[sequence.request_id]
        self._events.append(_event(sequence, sampled, error))
        if sequence.slot is None:
            if sequence.request.grammar is None or sequence.constraint is not None:
                self._scheduler.drop(sequence)
            elif self._compiler is not None:
                self._compiler.drop(sequence)
        elif not sequence.in_flight:
            self._give_back(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        if self._close_slot(sequence.slot) is not None:
            # The request has ended; whoever gets the slot next opens it anew, and fails if that fails.
            self.faults += 1
        self._scheduler.release(sequence)

    def _open_slot(self, sequence: Sequence) -> Exception | None:
        assert sequence.slot is not None
        try:
            self._runner.open_slot(sequence.slot, sequence.slot_state())
        except Exception as error:
            return error
        return None

    def _close_slot(self, slot: int) -> Exception | None:
        try:
            self._runner.close_slot(slot)
        except Exception as error:
            return error
        return None

    # --- faults ------------------------------------------------------------------------------------

    def _isolate(self, failed: list[Entry], error: Exception) -> None:
        """A batch raised: run its chunks again in smaller ones, so that only those at fault fail.

        Keys and values before a chunk are intact and its own are written again; slots are rebuilt, since
        sampling may have moved them on. A step queued behind the failed one is dropped and planned again.
        """
        self.faults += 1
        if isinstance(error, (MemoryError, NotEnoughMemoryError)):
            self._good_steps = 0
            self._scheduler.allow_chunks(len(failed) // 2)
        behind = self._take_in_flight()
        self._abandon([*failed, *behind])
        again = [(sequence, chunk) for sequence, chunk in failed if sequence.finish_reason is None]
        rerun = {sequence for sequence, _ in again}
        self._run_halves(again)
        for sequence, _ in behind:
            if sequence.finish_reason is None and sequence not in rerun:
                self.fail_on(self._rebuild_slot(sequence), sequence)

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
        assert sequence.slot is not None
        return self._close_slot(sequence.slot) or self._open_slot(sequence)

    def _run_halves(self, entries: list[Entry]) -> None:
        half = (len(entries) + 1) // 2
        self._run_again(entries[:half])
        self._run_again(entries[half:])

    def _run_again(self, entries: list[Entry]) -> None:
        """Run chunks whose step raised; if it raises again in halves, and a sequence alone fails."""
        ready = []
        for sequence, chunk in entries:
            error = self._rebuild_slot(sequence)
            self.fail_on(error, sequence)
            if error is None:
                sequence.requeue(chunk)
                ready.append((sequence, chunk))
        if not ready:
            return
        step = self._queue_forward(ready)
        self._queue_sample(step)
        try:
            results = step.wait()
        except Exception as error:
            error.__traceback__ = None
            self._abandon(ready)
            ready = [(sequence, chunk) for sequence, chunk in ready if sequence.finish_reason is None]
            if len(ready) == 1:
                self.fail_on(error, ready[0][0])
            else:
                self._run_halves(ready)
        else:
            self._apply(ready, results)


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
        cached_tokens=sequence.cached_tokens if is_first else 0,
        queued_seconds=max(sequence.queued_seconds, 0.0) if is_first else 0.0,
    )


def _ends_prefill(sequence: Sequence, sampled: Sampled | None) -> bool:
    if sampled is None:
        return sequence.finish_reason is FinishReason.LENGTH
    return sequence.generated_tokens == 1


def _not_finite(sequence: Sequence, what: str) -> NumericalError:
    return NumericalError(
        f"the logits of request {sequence.request_id} for its {what} are not finite, or all tokens are ruled out "
        f"(position {len(sequence.token_ids)})",
        remedy="Leave out grammar, logit_bias and logits_processors, and try --dtype float32; if it persists, the "
        "checkpoint or its quantization is damaged.",
    )
