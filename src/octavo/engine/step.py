"""One batch on its way through the runner: queued, waited for, or settled when nobody wants its results.

A runner may raise when work is queued or when its result is asked for; both come out of `Step.wait`. Sampling
is queued apart from the forward pass: where a mask is needed, the host makes it while the device computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, TypeVar

from octavo.engine.scheduler import Entry
from octavo.runners.base import Batch, Done, ForwardResult, Handle, Runner, Sampled, SampleResult

if TYPE_CHECKING:
    import numpy as np

ResultT = TypeVar("ResultT")

Results = tuple[ForwardResult, tuple[tuple[Sampled, ...], ...]]
"""Of the forward pass, and the tokens of each chunk that samples."""

_NOTHING_SAMPLED = Done(SampleResult(()))


@dataclass(frozen=True, slots=True)
class _Raised:
    """A handle on work that could not even be queued."""

    error: Exception

    def done(self) -> bool:
        return True

    def result(self) -> NoReturn:
        raise self.error


@dataclass(slots=True)
class Step:
    """A batch on its way through the runner."""

    entries: list[Entry]
    batch: Batch
    forward: Handle[ForwardResult]
    samples: bool
    """Whether a chunk samples, and forward could be queued."""
    lockstep: bool
    """Whether a chunk's sampling waits for the host, and with it the batch's."""
    sample: Handle[SampleResult] | None = None
    """None until it is queued, and where there is nothing to sample."""

    def queue_sample(
        self,
        runner: Runner,
        masks: Mapping[int, np.ndarray] | None = None,
        logits: Mapping[int, np.ndarray] | None = None,
    ) -> None:
        """Queue sampling where there is some; never raises what the runner raises."""
        if self.samples:
            try:
                self.sample = runner.sample(self.batch, masks, logits)
            except Exception as error:
                self.sample = _Raised(error)

    def failed(self) -> bool:
        """Whether the forward pass raised; waits for it."""
        return _settle(self.forward)[1] is not None

    def done(self) -> bool:
        return self.forward.done() and (self.sample is None or self.sample.done())

    def wait(self) -> Results:
        """Both results, once both are done: nothing of the step is under way afterwards, even if it raises."""
        forward, forward_error = _settle(self.forward)
        sample, sample_error = _settle(_NOTHING_SAMPLED if self.sample is None else self.sample)
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


def queue_forward(runner: Runner, entries: list[Entry]) -> Step:
    """Queue the forward pass; never raises what the runner raises. Sampling is to be queued next."""
    batch = Batch(tuple([chunk for _, chunk in entries]))
    try:
        forward = runner.forward(batch)
    except Exception as error:
        return Step(entries, batch, _Raised(error), samples=False, lockstep=False)
    return Step(
        entries,
        batch,
        forward,
        samples=any(chunk.sample for chunk in batch.chunks),
        lockstep=any(sequence.lockstep for sequence, _ in entries),
    )
