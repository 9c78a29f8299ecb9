"""Decides what the next step computes: who gets a slot, who decodes, how much of which prompt is fed.

A request is admitted when a slot is free and there are pages for the tokens it has; more are taken as it grows.
Where they run out, the sequence that ranks lowest gives its pages up and starts anew later (preemption by
recomputation), so the one that ranks first always goes on, and everyone ranks first in the end. Who ranks how
is waiting.py's, page tables are paging.py's. The engine opens and closes slots, queues steps and reads them
back. Standard library only.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from collections.abc import Sequence as Seq
from operator import attrgetter

from octavo.engine.paging import Paging
from octavo.engine.sequence import Sequence, SequenceState
from octavo.engine.waiting import WaitingQueue
from octavo.models.spec import KVGroup
from octavo.runners.base import Chunk

Entry = tuple[Sequence, Chunk]

Guess = Callable[[Sequence, int, int], tuple[int, ...]]
"""(sequence, most guesses, how many sequences hold a slot) -> guesses at its next tokens."""

MIXED_PROMPTS = 4

MAX_DRAFT_ROWS = 16
"""Most guesses verified in a step, of all sequences: beyond, a row costs as much as a token is worth."""

_rank = attrgetter("rank")


class Scheduler:
    """`groups` are `ModelSpec.kv_groups`; `kv_pages` counts the pages of each.

    A step prefills at most `prefill_chunk_tokens`. While other sequences decode, it takes at most
    `mixed_prefill_tokens` of each prompt and `MIXED_PROMPTS` times as many in all: that is how long a prompt, and
    how long many, may hold up their next token.
    """

    def __init__(
        self,
        groups: Seq[KVGroup],
        kv_pages: Seq[int],
        max_slots: int,
        prefill_chunk_tokens: int,
        mixed_prefill_tokens: int | None = None,
    ) -> None:
        self.paging = Paging(groups, kv_pages, prefill_chunk_tokens)
        self.wants_drain = False
        """Somebody lacks pages that can be had once no step is in flight."""
        self.preemptions = 0
        self.prefix_queried_tokens = 0
        """Prompt tokens looked up, once a request."""
        self.prefix_hit_tokens = 0
        self._prefill_tokens = prefill_chunk_tokens
        self._mixed_tokens = min(mixed_prefill_tokens or prefill_chunk_tokens, prefill_chunk_tokens)
        self._max_slots = self._max_chunks = max_slots
        self._free_slots = list(range(max_slots - 1, -1, -1))
        self._queue = WaitingQueue()
        self._active: list[Sequence] = []
        """Holding a slot, by rank."""
        self._preempted_slots: list[int] = []
        self._computing: dict[bytes, Sequence] = {}
        """Prefix key of a page -> who is prefilling it and will publish it."""
        self._leaders: dict[Sequence, list[bytes]] = {}
        """Who is prefilling pages that others may want -> their keys."""

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def active(self) -> int:
        """Sequences that hold a slot."""
        return len(self._active)

    def uses_adapter(self, name: str) -> bool:
        """Whether a sequence with a slot does, ended or not."""
        return any(sequence.request.adapter == name for sequence in self._active)

    # --- coming and going --------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, which must fit `Paging.longest_tokens`."""
        self._queue.add(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence that holds no slot out of the queue."""
        self._queue.remove(sequence)

    def admit(self) -> list[Sequence]:
        """Give slots to the first in the queue while they fit. Nobody overtakes: a long one is not starved."""
        admitted = []
        while self._queue and self._free_slots:
            sequence = self._queue.first()
            if self._active and not self._fits(sequence):
                break
            self._queue.take(sequence)
            sequence.slot = self._free_slots.pop()
            sequence.prefill_tokens = len(sequence.token_ids)
            sequence.started = sequence.stalled = False
            bisect.insort(self._active, sequence, key=_rank)
            admitted.append(sequence)
        return admitted

    def _fits(self, sequence: Sequence) -> bool:
        """Whether there are pages for the tokens it has, for what those admitted have yet to prefill, and one more
        for each that runs: it must not be preempted at once."""
        wanted = self._new_pages(sequence)
        for other in self._active:
            if other.queued_tokens < other.prefill_tokens:
                more = self.paging.missing_pages(other) if other.started else self._new_pages(other)
                wanted = [a + b for a, b in zip(wanted, more, strict=True)]
        available = self.paging.pool.available
        return all(pages + len(self._active) <= available(group) for group, pages in enumerate(wanted))

    def _new_pages(self, sequence: Sequence) -> list[int]:
        wanted = self.paging.new_pages(sequence)
        leader = self._leader(sequence)
        if leader is not None:  # what it computes now will be shared
            shared = sum(self._computing.get(key) is leader for key in self.paging.usable_keys(sequence))
            wanted = [max(pages - shared, 0) for pages in wanted]
        return wanted

    def release(self, sequence: Sequence) -> None:
        """Take back the slot and the pages of a finished sequence none of whose steps is in flight."""
        assert sequence.slot is not None
        assert sequence.state is SequenceState.FINISHED
        self._free_slots.append(sequence.slot)
        self._withdraw(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.preemptions += 1
        sequence.preemptions += 1
        self._preempted_slots.append(sequence.slot)
        self._withdraw(sequence)
        if sequence.generated_tokens == 0:
            sequence.prompt_logprobs.clear()  # they come again
        self._queue.add(sequence)

    def _withdraw(self, sequence: Sequence) -> None:
        self._stop_leading(sequence)
        self.paging.release(sequence)
        sequence.slot = sequence.leader = None
        self._active.remove(sequence)

    def take_preempted_slots(self) -> list[int]:
        """Slots of sequences the last plan preempted: to be closed, and free from here on."""
        slots, self._preempted_slots = self._preempted_slots, []
        self._free_slots += slots
        return slots

    def publish(self, sequence: Sequence) -> None:
        """What is computed is settled, since a token was sampled after it: others may share it."""
        self.paging.publish(sequence)
        self._stop_leading(sequence)

    def allow_chunks(self, chunks: int) -> None:
        """Plan at most so many chunks a step, and one at least: more did not fit the device's memory."""
        self._max_chunks = max(chunks, 1)

    def allow_more_chunks(self) -> None:
        """Twice as many as now."""
        self._max_chunks = min(2 * self._max_chunks, self._max_slots)

    # --- one plan ----------------------------------------------------------------------------------

    def plan(self, *, may_preempt: bool = True, guess: Guess | None = None) -> list[Entry]:
        """The chunks of the next step: a token of every sequence that decodes (or guesses to verify with it), and
        prompts within the budget. They count as queued from here on. `may_preempt`: no step is in flight."""
        if may_preempt:
            self.wants_drain = False
        active = self._active
        prefilling = [s for s in active if s.queued_tokens < s.prefill_tokens]
        prefills = self._allot(prefilling) if prefilling else {}
        entries: list[Entry] = []
        draft_rows = MAX_DRAFT_ROWS
        for sequence in active:  # who ranks lower may be preempted, and gone, before its turn
            if len(entries) == self._max_chunks:
                break
            queued = sequence.queued_tokens
            if queued >= sequence.feed_tokens or sequence.finish_reason is not None:
                continue
            if queued < sequence.prefill_tokens:
                tokens = prefills.get(sequence, 0)
                sequence.stalled = not (tokens and self._page(sequence, tokens, may_preempt))
                if not sequence.stalled:
                    entries.append((sequence, sequence.queue_prefill(tokens)))
                continue
            if guess is not None and sequence.speculation is not None:
                if sequence.in_flight:
                    continue  # what it would guess from is not read back yet
                guesses = guess(sequence, min(draft_rows, sequence.feed_tokens - queued - 1), len(active))
                if guesses and self.paging.extend(sequence, 1 + len(guesses)):
                    draft_rows -= len(guesses)
                    entries.append((sequence, sequence.queue_drafts(guesses)))
                    continue
            if queued < sequence.paging_due_at or self._page(sequence, 1, may_preempt):
                entries.append((sequence, sequence.queue_decode()))
        return entries

    def _allot(self, prefilling: list[Sequence]) -> dict[Sequence, int]:
        """How many tokens each prefilling sequence may feed. A prompt longer than the rest of the budget leaves
        half of it to those behind, so that a short one does not wait for all of it."""
        ready = [sequence for sequence in prefilling if self._ready(sequence)]
        if not ready:
            return {}
        most = left = self._prefill_tokens
        if self._anyone_decodes():
            most = self._mixed_tokens
            left = min(MIXED_PROMPTS * most, left)
        allotted = {}
        for sequence in ready:
            remaining = sequence.prefill_tokens - sequence.queued_tokens
            half = left if remaining <= left or sequence is ready[-1] else (left + 1) // 2
            allotted[sequence] = min(remaining, most, half)
            left -= allotted[sequence]
        for sequence in ready:
            remaining = sequence.prefill_tokens - sequence.queued_tokens
            more = min(left, min(remaining, most) - allotted[sequence])
            allotted[sequence] += more
            left -= more
        return allotted

    def _anyone_decodes(self) -> bool:
        return any(
            sequence.prefill_tokens <= sequence.queued_tokens < sequence.feed_tokens
            and sequence.finish_reason is None
            for sequence in self._active
        )

    def _page(self, sequence: Sequence, tokens: int, may_preempt: bool) -> bool:
        """See that the next `tokens` positions have pages, preempting who ranks lower where there are none."""
        while not self.paging.extend(sequence, tokens):
            victim = next(s for s in reversed(self._active) if s is sequence or any(s.page_tables))
            if not may_preempt:
                self.wants_drain |= victim is not sequence or bool(sequence.leaving_pages)
                return False
            if victim is sequence:
                return False  # it goes on when one that ranks higher ends, or takes its pages
            self._preempt(victim)
        return True

    # --- shared prefixes ---------------------------------------------------------------------------

    def _ready(self, sequence: Sequence) -> bool:
        """Whether a sequence with tokens to prefill may feed some; starts it where it waits for nobody."""
        if sequence.finish_reason is not None:
            return False
        if not sequence.started:
            sequence.leader = self._leader(sequence)
            if sequence.leader is None:
                self._start(sequence)
        return sequence.started

    def _leader(self, sequence: Sequence) -> Sequence | None:
        """Who is prefilling the next page of a sequence's prefix, which it need not compute again then; nobody
        where that one does not come on."""
        leader = sequence.leader
        if leader is None or leader not in self._leaders:
            found = self.paging.found_pages(sequence) if self._leaders else 0
            wanted = self.paging.usable_keys(sequence)[found : found + 1] if self._leaders else []
            leader = self._computing.get(wanted[0]) if wanted else None
        return None if leader is None or leader.stalled else leader

    def _start(self, sequence: Sequence) -> None:
        sequence.started = True
        self.paging.start(sequence)
        if sequence.generated_tokens == 0:
            sequence.cached_tokens = sequence.computed_tokens
        if sequence.reuses and not sequence.preemptions:
            self.prefix_queried_tokens += sequence.prompt_tokens
            self.prefix_hit_tokens += sequence.computed_tokens
        keys = sequence.keys[sequence.published_pages :]
        if keys:
            self._leaders[sequence] = keys
            self._computing.update(dict.fromkeys(keys, sequence))

    def _stop_leading(self, sequence: Sequence) -> None:
        for key in self._leaders.pop(sequence, ()):
            if self._computing.get(key) is sequence:
                del self._computing[key]

    def check(self) -> None:
        """Raise AssertionError unless each page is free, cached or held by sequences that are active, each slot
        free or held by one, and nobody else left a trace."""
        self.paging.check(self._active)
        held = [sequence.slot for sequence in self._active if sequence.slot is not None]
        slots = sorted([*self._free_slots, *self._preempted_slots, *held])
        assert slots == list(range(self._max_slots)), f"slots {slots} are not the {self._max_slots} there are"
        assert self._active == sorted(self._active, key=_rank)
        assert set(self._leaders) <= set(self._active), "a sequence that is gone still leads"
        assert set(self._computing.values()) <= set(self._leaders)
