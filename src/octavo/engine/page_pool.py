"""Which KV pages are free and which are used, for each KV group, and how many pages a sequence needs.

Plain bookkeeping of page numbers; the memory behind them is the runner's. A page in two sequences' tables
is silent corruption, so a double free is caught where it happens. Standard library only.
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
    """Free and used pages of every KV group. Page numbers run from 0 in each group."""

    def __init__(self, pages: Sequence[int]) -> None:
        self._total = tuple(pages)
        self._free = [list(range(count - 1, -1, -1)) for count in pages]
        self._used: list[set[int]] = [set() for _ in pages]

    @property
    def total(self) -> tuple[int, ...]:
        """Pages in each group."""
        return self._total

    @property
    def used(self) -> tuple[int, ...]:
        """Pages of each group that some sequence holds."""
        return tuple(len(used) for used in self._used)

    def allocate(self, group: int, count: int) -> tuple[int, ...]:
        """Take `count` pages of a group, of which so many must be free."""
        free = self._free[group]
        assert count <= len(free), f"group {group}: {count} pages asked for, {len(free)} free"
        pages = tuple(free.pop() for _ in range(count))
        self._used[group].update(pages)
        return pages

    def free(self, group: int, pages: Iterable[int]) -> None:
        """Give back pages that were allocated."""
        used = self._used[group]
        for page in pages:
            assert page in used, f"group {group}: page {page} is not allocated"
            used.remove(page)
            self._free[group].append(page)

    def check(self) -> None:
        """Raise AssertionError unless every page of every group is free or used, and only once."""
        for group, total in enumerate(self._total):
            free, used = self._free[group], self._used[group]
            assert sorted([*free, *used]) == list(range(total)), (
                f"group {group}: {len(free)} free and {len(used)} used pages are not the {total} there are"
            )
