"""A sequence's page tables: found in the prefix cache, extended as it is fed, cut behind windows, given back.

Only content that is settled can be found by others: full pages, computed, and proved finite by a token sampled
after them, since a number that is not finite in a page makes every later row of its sequence not finite.
Which pages are free is page_pool.py's; who gets them when they are short is scheduler.py's. Standard library
only.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from octavo.engine.page_pool import PagePool, pages_for_sequence, pages_for_tokens, pages_for_window
from octavo.engine.prefix import extend_keys
from octavo.engine.sequence import Sequence
from octavo.models.spec import KV_PAGE_TOKENS, KVGroup


class Paging:
    """`groups` are `ModelSpec.kv_groups`; `kv_pages` counts the pages of each."""

    def __init__(self, groups: Seq[KVGroup], kv_pages: Seq[int], prefill_chunk_tokens: int) -> None:
        self.pool = PagePool(kv_pages)
        self._windows = tuple(group.window for group in groups)
        self._window_groups = tuple((g, w) for g, w in enumerate(self._windows) if w is not None)
        self._chunk_tokens = prefill_chunk_tokens

    def longest_tokens(self, context_tokens: int) -> int:
        """Longest sequence, prompt and new tokens, that the pages can hold; at most `context_tokens`."""
        limits = [
            pages * KV_PAGE_TOKENS
            for window, pages in zip(self._windows, self.pool.total, strict=True)
            if window is None or pages < pages_for_window(window, self._chunk_tokens)
        ]
        return min([context_tokens, *limits])

    # --- what could be found -----------------------------------------------------------------------

    def usable_keys(self, sequence: Sequence) -> list[bytes]:
        """Keys of the pages a sequence may take from others, so that one token at least is left to compute."""
        if not sequence.reuses:
            return []
        extend_keys(sequence.keys, sequence.root_key, sequence.token_ids)
        return sequence.keys[: (len(sequence.token_ids) - 1) // KV_PAGE_TOKENS]

    def found_pages(self, sequence: Sequence) -> int:
        """How many leading pages of a sequence can be found now, in every group; of a window group only those its
        next query sees have to be there."""
        keys = self.usable_keys(sequence)
        count = len(keys)
        for group, window in enumerate(self._windows):
            if window is None:
                absent = (i for i in range(count) if self.pool.find(group, keys[i]) is None)
                count = next(absent, count)
        shorter = True
        while shorter:
            shorter = False
            for group, window in self._window_groups:
                for i in range(count - 1, _passed(count * KV_PAGE_TOKENS, window) - 1, -1):
                    if self.pool.find(group, keys[i]) is None:
                        count, shorter = i, True  # no longer prefix that sees page i can be found either
                        break
        return count

    def new_pages(self, sequence: Sequence) -> list[int]:
        """For each group, at most how many pages a sequence that has not started takes for the tokens it has.

        Pages that others hold cost nothing. Of windows, nothing is taken to be shared.
        """
        tokens = len(sequence.token_ids)
        found = self.found_pages(sequence)
        needed = []
        for group, window in enumerate(self._windows):
            pages = pages_for_sequence(window, tokens, self._chunk_tokens)
            if window is None:
                pages -= sum(self._is_used(group, key) for key in sequence.keys[:found])
            needed.append(pages)
        return needed

    def _is_used(self, group: int, key: bytes) -> bool:
        page = self.pool.find(group, key)
        return page is not None and self.pool.is_used(group, page)

    def missing_pages(self, sequence: Sequence) -> list[int]:
        """For each group, how many pages a sequence that has started still takes for the tokens it has."""
        return [
            max(
                pages_for_sequence(window, sequence.prefill_tokens, self._chunk_tokens) - len(table) + passed,
                0,
            )
            for window, table, passed in zip(
                self._windows, sequence.page_tables, sequence.passed_pages, strict=True
            )
        ]

    # --- a sequence's pages ------------------------------------------------------------------------

    def start(self, sequence: Sequence) -> None:
        """Give a sequence what can be found of its prefix: it counts as computed."""
        if sequence.root_key:
            extend_keys(sequence.keys, sequence.root_key, sequence.token_ids)
        count = self.found_pages(sequence)
        tokens = count * KV_PAGE_TOKENS
        tables = []
        for group, window in enumerate(self._windows):
            passed = 0 if window is None else _passed(tokens, window)
            pages = tuple(self._share(group, key) for key in sequence.keys[passed:count])
            tables.append((-1,) * passed + pages)
            sequence.passed_pages.append(passed)
        sequence.page_tables = tuple(tables)
        sequence.queued_tokens = sequence.computed_tokens = tokens
        _set_published(sequence, count)
        sequence.paging_due_at = tokens

    def _share(self, group: int, key: bytes) -> int:
        page = self.pool.find(group, key)
        assert page is not None
        self.pool.share(group, page)
        return page

    def extend(self, sequence: Sequence, tokens: int) -> bool:
        """See that the next `tokens` positions have pages; False where there are not enough to be had."""
        if self._window_groups:
            self._pass_window_pages(sequence)
        missing = pages_for_tokens(sequence.queued_tokens + tokens) - len(sequence.page_tables[0])
        if missing > 0:
            groups = range(len(self._windows))
            if any(self.pool.available(group) < missing for group in groups):
                return False
            sequence.page_tables = tuple(
                table + self.pool.take(group, missing) for group, table in enumerate(sequence.page_tables)
            )
        next_pass = (
            (sequence.passed_pages[group] + 1) * KV_PAGE_TOKENS + window - 1
            for group, window in self._window_groups
        )
        sequence.paging_due_at = min([len(sequence.page_tables[0]) * KV_PAGE_TOKENS, *next_pass])
        return True

    def _pass_window_pages(self, sequence: Sequence) -> None:
        """Take the pages no query from `queued_tokens` on will see out of the tables."""
        for group, window in self._window_groups:
            before, passed = sequence.passed_pages[group], _passed(sequence.queued_tokens, window)
            if passed > before:
                tables = list(sequence.page_tables)
                leaving = tables[group][before:passed]
                sequence.leaving_pages += [(group, page) for page in leaving]
                if sequence.root_key:
                    self._note_unsettled(sequence, group, before, leaving)
                tables[group] = (-1,) * passed + tables[group][passed:]
                sequence.page_tables = tuple(tables)
                sequence.passed_pages[group] = passed
        if sequence.leaving_pages and not sequence.in_flight:
            self.free_leaving_pages(sequence)

    def _note_unsettled(self, sequence: Sequence, group: int, first: int, pages: Iterable[int]) -> None:
        """Keep passed pages of a prompt, while nobody needs the room, under keys nobody else has."""
        for index, page in enumerate(pages, first):
            if index >= sequence.published_pages:
                self.pool.publish(group, page, _private_key(sequence, index))
                sequence.unsettled_pages.append((group, index, page))

    def free_leaving_pages(self, sequence: Sequence) -> None:
        """Hand back passed pages: the last step that reads them is done."""
        for group, page in sequence.leaving_pages:
            self.pool.give_back(group, (page,))
        sequence.leaving_pages.clear()

    def publish(self, sequence: Sequence) -> None:
        """Let others find what is computed: the token just sampled proved it finite."""
        if not sequence.root_key:
            _set_published(sequence, len(sequence.page_tables[0]))  # nothing to publish before the next page
            return
        extend_keys(sequence.keys, sequence.root_key, sequence.token_ids)
        self._settle(sequence, finite=True)
        full = min(sequence.computed_tokens, len(sequence.token_ids)) // KV_PAGE_TOKENS
        for group, table in enumerate(sequence.page_tables):
            for index in range(max(sequence.published_pages, sequence.passed_pages[group]), full):
                self.pool.publish(group, table[index], sequence.keys[index])
        _set_published(sequence, full)

    def _settle(self, sequence: Sequence, *, finite: bool) -> None:
        for group, index, page in sequence.unsettled_pages:
            key = sequence.keys[index] if finite else None
            self.pool.rename(group, page, _private_key(sequence, index), key)
        sequence.unsettled_pages.clear()

    def release(self, sequence: Sequence) -> None:
        """Take back every page of a sequence none of whose steps is in flight; it may start anew."""
        assert not sequence.in_flight
        self._settle(sequence, finite=False)
        self.free_leaving_pages(sequence)
        for group, table in enumerate(sequence.page_tables):
            # The end of a prefix goes before its beginning, without which it cannot be found.
            self.pool.give_back(group, reversed(table[sequence.passed_pages[group] :]))
        sequence.page_tables = ()
        sequence.passed_pages.clear()
        sequence.queued_tokens = sequence.computed_tokens = 0

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Raise AssertionError unless free + used + cached == total, and these sequences hold what is used."""
        held: list[list[int]] = [[] for _ in self._windows]
        for sequence in sequences:
            for group, table in enumerate(sequence.page_tables):
                held[group] += table[sequence.passed_pages[group] :]
            for group, page in sequence.leaving_pages:
                held[group].append(page)
        self.pool.check(held)


def _passed(position: int, window: int) -> int:
    """How many leading pages a query at `position`, and those after it, do not see."""
    return max(position - window + 1, 0) // KV_PAGE_TOKENS


def _set_published(sequence: Sequence, pages: int) -> None:
    sequence.published_pages = pages
    sequence.publish_at = (pages + 1) * KV_PAGE_TOKENS


def _private_key(sequence: Sequence, index: int) -> bytes:
    return b"unsettled %d %d" % (sequence.request_id, index)
