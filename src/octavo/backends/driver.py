"""The one thread that steps a backend, and the queues its events go to.

Users' threads submit and read; only this thread calls `step`, and it closes the backend when it ends. A backend
that raises is broken: every open request is told so, and the driver refuses more.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable

from octavo.backends.base import Backend
from octavo.errors import ClosedError
from octavo.types import FinishReason, Request, TokenEvent

_IDLE_SECONDS = 0.1
"""How long a step waits for work; `submit` wakes it at once."""

Sink = Callable[[TokenEvent], None]
"""Where a request's events go; called on the driver's thread, must not block or raise."""

_log = logging.getLogger("octavo")


class Driver:
    """Owns the backend. Thread-safe. `close` ends it, and so does the end of the program: a thread that is still
    inside a library when the interpreter goes down would abort the process."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._sinks: dict[int, Sink] = {}
        self._lock = threading.Lock()
        self._closing = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="octavo-engine", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            backend.close()
            raise
        atexit.register(self.close)

    def submit(self, request: Request, sink: Sink) -> int:
        """Queue a request; its events go to `sink`, the last one with a finish reason.

        Raises ClosedError after `close` or when the backend is broken, and what the backend refuses with.
        """
        with self._lock:  # the first event may come before submit returns the id
            if self._closing:
                raise self._refusal()
            request_id = self.backend.submit(request)
            self._sinks[request_id] = sink
            return request_id

    def cancel(self, request_id: int) -> None:
        """Stop a request; it still gets its last event. Unknown or finished ids have no effect. Takes no lock,
        since destructors call it."""
        self.backend.cancel(request_id)

    def stop(self) -> None:
        """`close` without waiting for it, and without a lock: for destructors, which run in any thread."""
        self._closing = True

    def close(self) -> None:
        """End what is running with ClosedError events, and wait until the backend is closed. Idempotent."""
        self.stop()
        self._thread.join()

    @property
    def failure(self) -> Exception | None:
        """What the backend raised, if it is broken."""
        return self._failure

    def wait(self) -> Exception | None:
        """Wait until it has ended, by `close` or by itself; what the backend raised in the latter case."""
        self._thread.join()
        return self._failure

    def _run(self) -> None:
        try:
            while not self._closing:
                self._deliver(self.backend.step(_IDLE_SECONDS))
        except BaseException as failure:  # whatever it is, those who wait must be told
            _log.exception("the engine stopped")
            self._failure = failure if isinstance(failure, Exception) else RuntimeError(repr(failure))
        self._closing = True
        with self._lock:  # who comes after this is refused
            self._end_all(self._failure or self._refusal())
        try:
            self.backend.close()
        except Exception:
            _log.exception("the engine did not close")
        atexit.unregister(self.close)

    def _deliver(self, events: list[TokenEvent]) -> None:
        for event in events:
            with self._lock:
                ended = event.finish_reason is not None
                sink = self._sinks.pop(event.request_id) if ended else self._sinks[event.request_id]
            sink(event)

    def _end_all(self, error: Exception) -> None:
        for request_id, sink in self._sinks.items():
            sink(TokenEvent(request_id, finish_reason=FinishReason.ERROR, error=error))
        self._sinks.clear()

    def _refusal(self) -> Exception:
        if self._failure is not None:
            return ClosedError(
                f"the engine stopped after an internal error: {self._failure}",
                remedy="Load the model again; run with --debug and report what it prints.",
            )
        return ClosedError("the model is closed", remedy="Load it again: LLM(...).")
