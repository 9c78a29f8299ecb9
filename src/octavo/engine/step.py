"""One batch on its way through the runner: queued, waited for, or settled when nobody wants its results.

A runner may raise when work is queued or when its result is asked for; both come out of `Step.wait`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn, TypeVar

from octavo.engine.scheduler import Entry
from octavo.runners.base import Batch, ForwardResult, Handle, Runner, Sampled, SampleResult

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class _Raised:
    """A handle on work that could not even be queued."""

    error: Exception

    def done(self) -> bool:
        return True

    def result(self) -> NoReturn:
        raise self.error


@dataclass(frozen=True, slots=True)
class Step:
    """A batch on its way through the runner."""

    entries: list[Entry]
    forward: Handle[ForwardResult]
    sample: Handle[SampleResult] | None
    """None where no chunk samples, or forward could not be queued."""

    def done(self) -> bool:
        return self.forward.done() and (self.sample is None or self.sample.done())

    def wait(self) -> tuple[ForwardResult, tuple[tuple[Sampled, ...], ...]]:
        """Both results, once both are done: nothing of the step is under way afterwards, even if it raises."""
        forward, forward_error = _settle(self.forward)
        sample, sample_error = _settle(self.sample) if self.sample is not None else (SampleResult(()), None)
        if forward is None or sample is None:
            raise forward_error or sample_error or AssertionError("a handle returned nothing")
        return forward, sample.tokens

    def settle(self) -> None:
        """Wait for both, whatever comes of them."""
        _settle(self.forward)
        if self.sample is not None:
            _settle(self.sample)


def _settle(handle: Handle[ResultT]) -> tuple[ResultT | None, Exception | None]:
    try:
        return handle.result(), None
    except Exception as error:
        return None, error


def queue_step(runner: Runner, entries: list[Entry]) -> Step:
    """Queue forward, and sampling where a chunk wants it; never raises what the runner raises."""
    batch = Batch(tuple(chunk for _, chunk in entries))
    forward: Handle[ForwardResult]
    sample: Handle[SampleResult] | None = None
    try:
        forward = runner.forward(batch)
    except Exception as error:
        return Step(entries, _Raised(error), None)
    if any(chunk.sample for chunk in batch.chunks):
        try:
            sample = runner.sample(batch)
        except Exception as error:
            sample = _Raised(error)
    return Step(entries, forward, sample)
