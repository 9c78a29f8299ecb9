"""One request on its way through the engine: its tokens, its slot, its pages, and how far it has come.

A sequence feeds positions 0, 1, 2, ... to the model: first the tokens it has in chunks (its prompt; after
preemption also what it had generated), then each token it sampled but the last. `queued_tokens` counts
positions handed to the runner, `computed_tokens` those whose step was read back, so a step is in flight
exactly while they differ. Standard library only.

    waiting --admit--> prefilling --all it has is queued--> running --finish--> finished
       ^└────────────────┴│───────────────finish──────────────┴│────────────────────┘
       └──────────────────┴──────────────preempt───────────────┘
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from octavo.engine.hooks import Constraint
from octavo.engine.speculation import Speculation
from octavo.runners.base import Chunk, SlotState
from octavo.types import FinishReason, Request, TokenLogprob


class SequenceState(enum.Enum):
    WAITING = "waiting"
    PREFILLING = "prefilling"
    """Holds a slot; some of the tokens it has are not queued yet."""
    RUNNING = "running"
    """All it has is queued."""
    FINISHED = "finished"
    """Its last event is out; holds its slot and pages while a step on them is in flight."""


@dataclass(slots=True, eq=False)
class Sequence:
    request_id: int
    request: Request
    submitted_at: float = 0.0
    """By the engine's clock, in seconds."""
    root_key: bytes = b""
    """Where the chain of its prefix keys starts; empty: none of its pages can be found or shared."""
    keys: list[bytes] = field(default_factory=list)
    """Prefix keys of the first full pages of `token_ids`; those of the prompt from the start."""

    rank: tuple[int, int] = field(init=False)
    """Lowest first: who gets a slot, tokens and pages before whom. Higher priority, then earlier arrival."""
    queued_seconds: float = -1.0
    """From submit to admission; negative until then."""
    token_ids: list[int] = field(init=False)
    """Prompt and generated tokens that were read back."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    constraint: Constraint | None = None
    speculation: Speculation | None = None

    slot: int | None = None
    queued_tokens: int = 0
    computed_tokens: int = 0
    prefill_tokens: int = 0
    """How many tokens it had when it was admitted: it feeds these in chunks, then what it samples."""
    cached_tokens: int = 0
    """Of its prompt, those whose keys and values were found when it last started before its first token."""

    page_tables: tuple[tuple[int, ...], ...] = ()
    """For each KV group, the page of tokens [32 i, 32 i + 32); -1 where its window has moved past them."""
    passed_pages: list[int] = field(default_factory=list)
    """For each KV group, how many leading pages its window has moved past."""
    leaving_pages: list[tuple[int, int]] = field(default_factory=list)
    """(group, page) of passed pages that the step in flight still reads."""
    unsettled_pages: list[tuple[int, int, int]] = field(default_factory=list)
    """(group, index in its table, page) of passed pages that no token proved finite yet."""
    paging_due_at: int = 0
    """Positions from here on need a look at the pages before they are queued."""
    published_pages: int = 0
    """How many leading pages of each table others can find, or could while they were paged."""
    publish_at: int = 0
    """How many tokens are computed when there is one more page for others to find."""

    started: bool = False
    """Since it was last admitted: its prefix was looked up, and feeding begun."""
    stalled: bool = False
    """It had tokens to prefill and the last plan gave it no room."""
    leader: Sequence | None = None
    """Who is computing what it waits to share."""
    preemptions: int = 0

    lockstep: bool = field(init=False)
    """Its sampling waits for the host: a mask or changed logits follow from the token before."""
    stop_token_ids: frozenset[int] = field(init=False)
    prompt_tokens: int = field(init=False)
    feed_tokens: int = field(init=False)
    """Positions fed in its whole life: the last token sampled is not."""

    def __post_init__(self) -> None:
        request = self.request
        self.token_ids = list(request.prompt_token_ids)
        self.prompt_tokens = len(self.token_ids)
        self.feed_tokens = self.prompt_tokens + max(request.max_new_tokens - 1, 0)
        self.stop_token_ids = request.stop_token_ids
        self.lockstep = request.grammar is not None or bool(request.logits_processors)
        self.rank = (-request.priority, self.request_id)

    @property
    def state(self) -> SequenceState:
        if self.finish_reason is not None:
            return SequenceState.FINISHED
        if self.slot is None:
            return SequenceState.WAITING
        if self.queued_tokens < self.prefill_tokens:
            return SequenceState.PREFILLING
        return SequenceState.RUNNING

    @property
    def in_flight(self) -> bool:
        """Whether a step queued on its slot and pages has not been read back."""
        return self.queued_tokens > self.computed_tokens

    @property
    def generated_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_tokens

    @property
    def reuses(self) -> bool:
        """Whether it may take what others computed: not where every prompt token's logits are wanted."""
        return bool(self.root_key) and self.request.prompt_logprobs is None

    def slot_state(self) -> SlotState:
        """What a runner needs to go on after the last token that was read back."""
        return SlotState(
            token_ids=tuple(self.token_ids),
            prompt_tokens=self.prompt_tokens,
            sampling=self.request.sampling,
            adapter=self.request.adapter,
        )

    def queue_prefill(self, tokens: int) -> Chunk:
        """The next `tokens` positions of what it has, as a chunk to forward."""
        assert self.slot is not None
        start, end = self.queued_tokens, self.queued_tokens + tokens
        self.queued_tokens = end
        targets = None
        if self.request.prompt_logprobs is not None and self.prefill_tokens == self.prompt_tokens:
            following = self.request.prompt_token_ids[start + 1 : end + 1]
            targets = following if len(following) == tokens else (*following, -1)
        return Chunk(
            slot=self.slot,
            start=start,
            token_ids=tuple(self.token_ids[start:end]),
            page_tables=self.page_tables,
            sample=end == self.prefill_tokens and self.request.max_new_tokens > 0,
            targets=targets,
            top_logprobs=self.request.prompt_logprobs or 0,
        )

    def queue_decode(self) -> Chunk:
        """The token last sampled, which may not have been read back yet, as a chunk to forward."""
        slot, start = self.slot, self.queued_tokens
        assert slot is not None
        self.queued_tokens = start + 1
        return Chunk(slot, start, None, self.page_tables, True)

    def queue_drafts(self, guesses: tuple[int, ...]) -> Chunk:
        """The token last sampled, which was read back, and guesses at those after it."""
        assert self.slot is not None
        assert not self.in_flight
        start = self.queued_tokens
        self.queued_tokens = start + 1 + len(guesses)
        token_ids = (self.token_ids[-1], *guesses)
        return Chunk(self.slot, start, token_ids, self.page_tables, True, drafts=len(guesses))

    def requeue(self, chunk: Chunk) -> None:
        """Count a chunk as queued again after `rewind`."""
        self.queued_tokens += chunk.tokens

    def rewind(self) -> None:
        """Forget the steps in flight: their chunks are to be queued again."""
        self.queued_tokens = self.computed_tokens
