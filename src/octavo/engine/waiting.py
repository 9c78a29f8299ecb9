"""The requests that wait for a slot, in the order they get one.

Higher priority first, then first come first served; one that was preempted keeps its place. So that nobody
starves: of the requests admitted, at most `MAX_OVERTAKEN` in a row go before one that came earlier; then the
one that has waited longest goes first, ranks before every other until it ends, and is not preempted for
them. Standard library only.
"""

from __future__ import annotations

import bisect
from operator import attrgetter

from octavo.engine.sequence import Sequence

MAX_OVERTAKEN = 8
_BEFORE_ALL = -(2**63)
"""First part of a rank that no priority reaches."""

_rank = attrgetter("rank")
_arrival = attrgetter("request_id")


class WaitingQueue:
    def __init__(self) -> None:
        self._sequences: list[Sequence] = []
        """By rank."""
        self._overtaken = 0
        """How many in a row were admitted before one that came earlier."""

    def __len__(self) -> int:
        return len(self._sequences)

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self._sequences, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        index = bisect.bisect_left(self._sequences, sequence.rank, key=_rank)
        assert self._sequences[index] is sequence
        del self._sequences[index]

    def first(self) -> Sequence:
        """Who is next; taken by `take`."""
        if self._overtaken >= MAX_OVERTAKEN:
            return min(self._sequences, key=_arrival)
        return self._sequences[0]

    def take(self, sequence: Sequence) -> None:
        """Admit the one that `first` gave."""
        self.remove(sequence)
        if self._overtakes(sequence):
            self._overtaken += 1
            return
        if self._overtaken >= MAX_OVERTAKEN:
            sequence.rank = (_BEFORE_ALL, sequence.request_id)
        self._overtaken = 0

    def _overtakes(self, sequence: Sequence) -> bool:
        """Whether one that came earlier still waits: never where all have one priority, which costs no search."""
        if (
            not self._sequences
            or self._sequences[0].rank[0] == self._sequences[-1].rank[0] == sequence.rank[0]
        ):
            return False
        return min(self._sequences, key=_arrival).request_id < sequence.request_id
