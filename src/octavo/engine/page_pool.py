"""Which KV pages of each group are free, held by sequences, or kept for whoever has the same prefix.

A page is *used* while a sequence holds it, *cached* when none does but its content can be found under a prefix
key, and *free* otherwise; several sequences may hold one page whose content is settled. Plain bookkeeping of
page numbers: the memory is the runner's, what a sequence needs is paging.py's. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from octavo.models.spec import KV_PAGE_TOKENS


def pages_for_tokens(tokens: int) -> int:
    """Pages that hold the first `tokens` tokens of a sequence."""
    return -(-tokens // KV_PAGE_TOKENS)


def pages_for_window(window: int, chunk_tokens: int) -> int:
    """Most pages of a window group a sequence of any length holds at once.

    Those a chunk's queries see, at any alignment to pages: `window - 1` tokens before it and its own. Two
    decode steps may be queued at once, so a chunk counts as two tokens at least.
    """
    span_tokens = window - 1 + max(chunk_tokens, 2)
    return pages_for_tokens(span_tokens - 1) + 1


def pages_for_sequence(window: int | None, tokens: int, chunk_tokens: int) -> int:
    """Most pages of one KV group (window None: full attention) a sequence of `tokens` tokens holds at once."""
    pages = pages_for_tokens(tokens)
    return pages if window is None else min(pages, pages_for_window(window, chunk_tokens))


class PagePool:
    """Page numbers run from 0 in each group. A page in two tables that one of them writes to is silent
    corruption, so giving back what is not held is caught where it happens."""

    def __init__(self, pages: Sequence[int]) -> None:
        self.evictions = 0
        """Cached pages given to someone else since the start."""
        self._total = tuple(pages)
        self._free = [list(range(count - 1, -1, -1)) for count in pages]
        self._holders = [[0] * count for count in pages]
        """For each page, how many sequences hold it."""
        self._keys: list[dict[int, bytes]] = [{} for _ in pages]
        """The prefix key of each page that can be found."""
        self._pages: list[dict[bytes, int]] = [{} for _ in pages]
        self._cached: list[dict[int, None]] = [{} for _ in pages]
        """Pages with a key that nobody holds, the one least recently held first."""

    @property
    def total(self) -> tuple[int, ...]:
        """Pages in each group."""
        return self._total

    @property
    def free(self) -> tuple[int, ...]:
        """Pages of each group with no content anybody could want."""
        return tuple(len(free) for free in self._free)

    @property
    def cached(self) -> tuple[int, ...]:
        """Pages of each group that nobody holds and that can be found."""
        return tuple(len(cached) for cached in self._cached)

    @property
    def used(self) -> tuple[int, ...]:
        """Pages of each group that some sequence holds."""
        return tuple(
            total - len(free) - len(cached)
            for total, free, cached in zip(self._total, self._free, self._cached, strict=True)
        )

    def available(self, group: int) -> int:
        """How many pages of a group could be taken now."""
        return len(self._free[group]) + len(self._cached[group])

    def take(self, group: int, count: int) -> tuple[int, ...]:
        """Hold `count` pages of a group to write to, of which so many must be available."""
        free = self._free[group]
        assert count <= self.available(group), f"group {group}: {count} pages asked for, fewer available"
        while len(free) < count:
            self._evict(group)
        pages = tuple(free.pop() for _ in range(count))
        holders = self._holders[group]
        for page in pages:
            holders[page] = 1
        return pages

    def _evict(self, group: int) -> None:
        page = next(iter(self._cached[group]))
        del self._cached[group][page]
        del self._pages[group][self._keys[group].pop(page)]
        self._free[group].append(page)
        self.evictions += 1

    def find(self, group: int, key: bytes) -> int | None:
        """The page whose content the key stands for."""
        return self._pages[group].get(key)

    def is_used(self, group: int, page: int) -> bool:
        return self._holders[group][page] > 0

    def share(self, group: int, page: int) -> None:
        """Hold a page that was found, to read only."""
        assert page in self._keys[group], f"group {group}: page {page} has no key"
        self._holders[group][page] += 1
        self._cached[group].pop(page, None)

    def publish(self, group: int, page: int, key: bytes) -> None:
        """Let a held page be found: it is full and its content settled. Where its content can be found in another
        page already, this one stays its holder's own."""
        assert self._holders[group][page], f"group {group}: page {page} is not held"
        if key not in self._pages[group] and page not in self._keys[group]:
            self._keys[group][page] = key
            self._pages[group][key] = page

    def rename(self, group: int, page: int, key: bytes, new_key: bytes | None) -> None:
        """Let the page found under `key`, if there still is one, be found under `new_key` instead (None: no more)."""
        if self._pages[group].get(key) != page:
            return
        del self._pages[group][key]
        if new_key is not None and new_key not in self._pages[group]:
            self._keys[group][page] = new_key
            self._pages[group][new_key] = page
            return
        del self._keys[group][page]
        if page in self._cached[group]:
            del self._cached[group][page]
            self._free[group].append(page)

    def give_back(self, group: int, pages: Iterable[int]) -> None:
        """End a sequence's hold on pages. Of several, the first is evicted first."""
        holders, keys = self._holders[group], self._keys[group]
        for page in pages:
            assert holders[page] > 0, f"group {group}: page {page} is not held"
            holders[page] -= 1
            if not holders[page]:
                if page in keys:
                    self._cached[group][page] = None
                else:
                    self._free[group].append(page)

    def check(self, held: Sequence[Sequence[int]]) -> None:
        """Raise AssertionError unless free + used + cached == total in every group, and pages are held by
        exactly those in `held`: for each group, every page of every sequence."""
        for group, total in enumerate(self._total):
            free, cached = self._free[group], self._cached[group]
            holders, keys = self._holders[group], self._keys[group]
            used = [page for page in range(total) if holders[page]]
            assert sorted([*free, *cached, *used]) == list(range(total)), (
                f"group {group}: {len(free)} free, {len(used)} used and {len(cached)} cached pages "
                f"are not the {total} there are"
            )
            counts = [0] * total
            for page in held[group]:
                counts[page] += 1
            assert counts == holders, f"group {group}: sequences hold {sum(counts)} pages, not {sum(holders)}"
            assert {key: page for page, key in keys.items()} == self._pages[group], f"group {group}: keys"
            assert set(cached) <= set(keys), f"group {group}: a cached page has no key"
            assert not set(free) & set(keys), f"group {group}: a free page has a key"
