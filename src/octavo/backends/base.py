"""The Backend contract: tokens in, token events out. `LLM` has one and knows nothing below it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from octavo.types import Request, TokenEvent


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What requests this backend takes; the validator refuses the rest by name."""

    vocab_size: int
    context_tokens: int
    prompt_logprobs: bool
    max_logprobs: int
    adapters: bool
    grammars: bool


class Backend(Protocol):
    """`submit` and `cancel` are thread-safe; one thread calls `step`."""

    @property
    def capabilities(self) -> Capabilities: ...

    def submit(self, request: Request) -> int:
        """Queue a request; returns its id. Raises ClosedError after close."""

    def cancel(self, request_id: int) -> None:
        """Stop a request at the next step; its last event has finish_reason CANCELLED. Unknown ids: no effect.

        Takes no lock, since destructors call it.
        """

    def step(self, timeout_seconds: float) -> list[TokenEvent]:
        """Do one step of work, waiting at most this long for some to arrive; [] when there was none."""

    def info(self) -> Mapping[str, Any]:
        """Facts for `LLM.info()`: runner, device, memory by part, compiled counters."""

    def close(self) -> None:
        """Fail what is running with ClosedError events and give memory back. Idempotent."""
