"""Decides what the next step computes: who gets a slot, who decodes, how much of which prompt is fed.

First come, first served. A request is admitted when a slot is free and the pages of its whole life can be
set aside, so a sequence that runs never has to give way; pages are taken as they are needed. The engine
opens slots, queues steps and reads them back. Standard library only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq

from octavo.engine.page_pool import PagePool, pages_for_sequence, pages_for_tokens, pages_for_window
from octavo.engine.sequence import Sequence, SequenceState
from octavo.models.spec import KV_PAGE_TOKENS, KVGroup
from octavo.runners.base import Chunk

Entry = tuple[Sequence, Chunk]


class Scheduler:
    """`groups` are `ModelSpec.kv_groups`; `kv_pages` counts the pages of each."""

    def __init__(
        self, groups: Seq[KVGroup], kv_pages: Seq[int], max_slots: int, prefill_chunk_tokens: int
    ) -> None:
        self.pool = PagePool(kv_pages)
        self._windows = tuple(group.window for group in groups)
        self._window_groups = tuple((g, w) for g, w in enumerate(self._windows) if w is not None)
        self._prefill_chunk_tokens = prefill_chunk_tokens
        self._max_slots = max_slots
        self._free_slots = list(range(max_slots - 1, -1, -1))
        self._waiting: deque[Sequence] = deque()
        self._active: list[Sequence] = []
        """Holding a slot, in order of arrival."""
        self._set_aside: dict[Sequence, tuple[int, ...]] = {}
        """For each active sequence, the most pages it may hold in each group."""
        self._unclaimed = list(kv_pages)
        """Pages of each group that are not set aside."""

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Sequences that hold a slot."""
        return len(self._active)

    def longest_tokens(self, context_tokens: int) -> int:
        """Longest sequence, prompt and new tokens, that the pages can hold; at most `context_tokens`."""
        limits = [
            pages * KV_PAGE_TOKENS
            for window, pages in zip(self._windows, self.pool.total, strict=True)
            if window is None or pages < pages_for_window(window, self._prefill_chunk_tokens)
        ]
        return min([context_tokens, *limits])

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind those that came before it; it must fit `longest_tokens`."""
        self._waiting.append(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence that was never admitted out of the queue."""
        self._waiting.remove(sequence)

    def admit(self) -> list[Sequence]:
        """Give slots to the first in the queue while they fit. Nobody overtakes: a long request is not starved."""
        admitted = []
        while self._waiting and self._free_slots:
            sequence = self._waiting[0]
            needed = self._pages_for(sequence)
            if any(pages > left for pages, left in zip(needed, self._unclaimed, strict=True)):
                break
            self._waiting.popleft()
            for group, pages in enumerate(needed):
                self._unclaimed[group] -= pages
            sequence.slot = self._free_slots.pop()
            sequence.page_tables = ((),) * len(self._windows)
            sequence.passed_pages = [0] * len(self._windows)
            sequence.leaving_pages = [[] for _ in self._windows]
            self._active.append(sequence)
            self._set_aside[sequence] = needed
            admitted.append(sequence)
        return admitted

    def _pages_for(self, sequence: Sequence) -> tuple[int, ...]:
        return tuple(
            pages_for_sequence(window, sequence.feed_tokens, self._prefill_chunk_tokens)
            for window in self._windows
        )

    def plan(self) -> list[Entry]:
        """The chunks of the next step: one decode token of every running sequence, then prompts in order of
        arrival, `prefill_chunk_tokens` in total. They count as queued from here on."""
        entries: list[Entry] = []
        prefilling: list[Sequence] = []
        for sequence in self._active:
            if sequence.finish_reason is not None or sequence.queued_tokens >= sequence.feed_tokens:
                continue
            if sequence.queued_tokens < sequence.prompt_tokens:
                prefilling.append(sequence)
            elif self._page(sequence, 1):
                entries.append((sequence, sequence.queue_decode()))
        budget = self._prefill_chunk_tokens
        for sequence in prefilling:
            tokens = min(budget, sequence.prompt_tokens - sequence.queued_tokens)
            if tokens and self._page(sequence, tokens):
                entries.append((sequence, sequence.queue_prefill(tokens)))
                budget -= tokens
        return entries

    def _page(self, sequence: Sequence, tokens: int) -> bool:
        """See that the next `tokens` positions have pages. False where the step in flight still reads window
        pages, and with them the sequence would exceed what was set aside for it."""
        if self._window_groups:
            self._pass_window_pages(sequence)
        pages = pages_for_tokens(sequence.queued_tokens + tokens)
        missing = pages - len(sequence.page_tables[0])
        if missing <= 0:
            return True
        aside = self._set_aside[sequence]
        for group, _ in self._window_groups:
            held = pages - sequence.passed_pages[group] + len(sequence.leaving_pages[group])
            if held > aside[group]:
                return False
        sequence.page_tables = tuple(
            table + self.pool.allocate(group, missing) for group, table in enumerate(sequence.page_tables)
        )
        return True

    def _pass_window_pages(self, sequence: Sequence) -> None:
        """Take the pages no query from `queued_tokens` on will see out of the tables."""
        for group, window in self._window_groups:
            before = sequence.passed_pages[group]
            passed = max(sequence.queued_tokens - window + 1, 0) // KV_PAGE_TOKENS
            if passed > before:
                tables = list(sequence.page_tables)
                sequence.leaving_pages[group] += tables[group][before:passed]
                tables[group] = (-1,) * passed + tables[group][passed:]
                sequence.page_tables = tuple(tables)
                sequence.passed_pages[group] = passed
        if not sequence.in_flight:
            self.free_leaving_pages(sequence)

    def free_leaving_pages(self, sequence: Sequence) -> None:
        """Hand back passed pages: the last step that reads them is done."""
        for group, _ in self._window_groups:
            leaving = sequence.leaving_pages[group]
            if leaving:
                self.pool.free(group, leaving)
                leaving.clear()

    def release(self, sequence: Sequence) -> None:
        """Take back the slot and the pages of a finished sequence none of whose steps is in flight."""
        assert sequence.slot is not None
        assert sequence.state is SequenceState.FINISHED
        assert not sequence.in_flight
        self.free_leaving_pages(sequence)
        for group, table in enumerate(sequence.page_tables):
            self.pool.free(group, table[sequence.passed_pages[group] :])
        sequence.page_tables = ()
        self._free_slots.append(sequence.slot)
        sequence.slot = None
        self._active.remove(sequence)
        for group, pages in enumerate(self._set_aside.pop(sequence)):
            self._unclaimed[group] += pages

    def check(self) -> None:
        """Raise AssertionError unless each page and slot is free or held by exactly one active sequence."""
        self.pool.check()
        held = [0] * len(self._windows)
        for sequence in self._active:
            for group, table in enumerate(sequence.page_tables):
                pages = len(table) - sequence.passed_pages[group] + len(sequence.leaving_pages[group])
                assert pages <= self._set_aside[sequence][group]
                held[group] += pages
        assert tuple(held) == self.pool.used, f"sequences hold {held} pages, {self.pool.used} are used"
        slots = sorted([*self._free_slots, *(s.slot for s in self._active if s.slot is not None)])
        assert slots == list(range(self._max_slots)), f"slots {slots} are not the {self._max_slots} there are"
