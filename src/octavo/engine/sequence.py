"""One request on its way through the engine: its tokens, its slot, its pages, and how far it has come.

A sequence feeds positions 0, 1, 2, ... to the model: first its prompt in chunks, then each token it
sampled but the last. `queued_tokens` counts positions handed to the runner, `computed_tokens` those whose
step was read back, so a step is in flight exactly while they differ. Standard library only.

    waiting --admit--> prefilling --prompt queued--> running --finish--> finished
       └──────────────────┴──────────────finish──────────────────────────────┘
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from octavo.runners.base import Chunk, SlotState
from octavo.types import FinishReason, Request, TokenLogprob


class SequenceState(enum.Enum):
    WAITING = "waiting"
    PREFILLING = "prefilling"
    """Holds a slot; some of its prompt is not queued yet."""
    RUNNING = "running"
    """Its whole prompt is queued."""
    FINISHED = "finished"
    """Its last event is out; holds its slot and pages while a step on them is in flight."""


@dataclass(slots=True, eq=False)
class Sequence:
    request_id: int
    request: Request
    submitted_at: float = 0.0
    """By the engine's clock, in seconds."""
    queued_seconds: float = 0.0
    """From submit to admission; 0 until then."""
    token_ids: list[int] = field(init=False)
    """Prompt and generated tokens that were read back."""
    slot: int | None = None
    page_tables: tuple[tuple[int, ...], ...] = ()
    """For each KV group, the page of tokens [32 i, 32 i + 32); -1 where its window has moved past them."""
    passed_pages: list[int] = field(default_factory=list)
    """For each KV group, how many leading pages its window has moved past."""
    leaving_pages: list[list[int]] = field(default_factory=list)
    """For each KV group, passed pages that the step in flight still reads."""
    queued_tokens: int = 0
    computed_tokens: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    prompt_tokens: int = field(init=False)
    feed_tokens: int = field(init=False)
    """Positions fed in its whole life: the last token sampled is not."""

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        self.prompt_tokens = len(self.token_ids)
        self.feed_tokens = self.prompt_tokens + max(self.request.max_new_tokens - 1, 0)

    @property
    def state(self) -> SequenceState:
        if self.finish_reason is not None:
            return SequenceState.FINISHED
        if self.slot is None:
            return SequenceState.WAITING
        if self.queued_tokens < self.prompt_tokens:
            return SequenceState.PREFILLING
        return SequenceState.RUNNING

    @property
    def in_flight(self) -> bool:
        """Whether a step queued on its slot and pages has not been read back."""
        return self.queued_tokens > self.computed_tokens

    @property
    def generated_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_tokens

    def slot_state(self) -> SlotState:
        """What a runner needs to go on after the last token that was read back."""
        return SlotState(
            token_ids=tuple(self.token_ids),
            prompt_tokens=self.prompt_tokens,
            sampling=self.request.sampling,
            adapter=self.request.adapter,
        )

    def queue_prefill(self, tokens: int) -> Chunk:
        """The next `tokens` positions of the prompt, as a chunk to forward."""
        assert self.slot is not None
        start, end = self.queued_tokens, self.queued_tokens + tokens
        self.queued_tokens = end
        prompt = self.request.prompt_token_ids
        targets = None
        if self.request.prompt_logprobs is not None:
            following = prompt[start + 1 : end + 1]
            targets = following if len(following) == tokens else (*following, -1)
        return Chunk(
            slot=self.slot,
            start=start,
            token_ids=prompt[start:end],
            page_tables=self.page_tables,
            sample=end == self.prompt_tokens and self.request.max_new_tokens > 0,
            targets=targets,
            top_logprobs=self.request.prompt_logprobs or 0,
        )

    def queue_decode(self) -> Chunk:
        """The token last sampled, which may not have been read back yet, as a chunk to forward."""
        assert self.slot is not None
        start = self.queued_tokens
        self.queued_tokens = start + 1
        return Chunk(self.slot, start, None, self.page_tables, True)

    def requeue(self, chunk: Chunk) -> None:
        """Count a chunk as queued again after `rewind`."""
        self.queued_tokens += chunk.tokens

    def rewind(self) -> None:
        """Forget the steps in flight: their chunks are to be queued again."""
        self.queued_tokens = self.computed_tokens
