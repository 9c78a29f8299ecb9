"""How much may wait: requests and prompt tokens that have not had their first token yet. More is refused at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from octavo.server.faults import overloaded

_LONGEST_RETRY_SECONDS = 120


class Admission:
    """Counts on the loop's thread. What was admitted leaves the queue with its first token, or its end."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self.waiting = 0
        self.waiting_tokens = 0
        self.open = 0
        """Requests of any age: what a drain waits for."""
        self.refused = 0
        self._seconds_each = 1.0
        """How long one place in the queue took lately."""

    def check(self) -> None:
        """Refuse before anything is read, where the queue is full already. Raises HttpFault 429."""
        if self.waiting >= self._max_requests:
            self._refuse(
                f"{self.waiting} requests are waiting; at most {self._max_requests} may", "queue_full"
            )

    def enter(self, requests: int, prompt_tokens: int) -> Place:
        """A place for `requests` sequences of one HTTP request. Raises HttpFault 429.

        One request is taken into an empty queue however many tokens it has: the context bounds it.
        """
        if self.waiting + requests > self._max_requests and not (
            self.waiting == 0 and requests > self._max_requests
        ):
            self._refuse(
                f"{self.waiting} requests are waiting and this one makes {requests} more; "
                f"at most {self._max_requests} may",
                "queue_full",
            )
        if self.waiting and self.waiting_tokens + prompt_tokens > self._max_tokens:
            self._refuse(
                f"{self.waiting_tokens} prompt tokens are waiting and this request has {prompt_tokens}; "
                f"at most {self._max_tokens} may",
                "token_budget",
            )
        self.waiting += requests
        self.waiting_tokens += prompt_tokens
        return Place(self, requests, prompt_tokens)

    def _refuse(self, why: str, code: str) -> None:
        self.refused += 1
        seconds = min(max(1, math.ceil(self._seconds_each * self.waiting / 4)), _LONGEST_RETRY_SECONDS)
        raise overloaded(f"the server is busy: {why}", code, seconds)

    def note_wait(self, seconds: float) -> None:
        self._seconds_each += 0.05 * (seconds / max(1, self.waiting) - self._seconds_each)


@dataclass(slots=True)
class Place:
    """What one HTTP request holds of the queue."""

    _queue: Admission
    _requests: int
    _prompt_tokens: int

    def leave(self, requests: int | None = None) -> None:
        """Give back the places of `requests` sequences that have started, or all that are left."""
        count = self._requests if requests is None else min(requests, self._requests)
        tokens = (
            self._prompt_tokens
            if count == self._requests
            else self._prompt_tokens * count // max(1, self._requests)
        )
        self._requests -= count
        self._prompt_tokens -= tokens
        self._queue.waiting -= count
        self._queue.waiting_tokens -= tokens
