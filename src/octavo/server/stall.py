"""Cuts off a client that takes nothing for a while, at the price of one timer an answer: one for each message of a
stream would cost more than most messages do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable


class ClientGone(Exception):  # noqa: N818
    """The client closed the connection, or takes nothing any more: there is nobody to tell."""


class StallWatch:
    """Of one answer, whose messages are sent one after the other."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._sender: asyncio.Task[object] | None = None
        """Who is sending now."""
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._stalled = False

    async def send(self, sending: Awaitable[None]) -> None:
        """Wait for `sending`. Raises ClientGone where it takes longer than it may, or the connection is closed."""
        loop = asyncio.get_running_loop()
        self._sender, self._since = asyncio.current_task(), loop.time()
        if self._timer is None:
            self._timer = loop.call_later(self._seconds, self._look, loop)
        try:
            await sending
        except asyncio.CancelledError:
            # Whoever else cancelled the task comes first.
            if self._stalled and self._sender is not None and self._sender.uncancel() == 0:
                raise ClientGone from None
            raise
        except OSError:
            raise ClientGone from None
        finally:
            self._sender = None

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._sender is None:
            return  # nothing is being sent: the next message sets a timer
        left = self._since + self._seconds - loop.time()
        if left > 0:
            self._timer = loop.call_later(left, self._look, loop)
        else:
            self._stalled = True
            self._sender.cancel()
