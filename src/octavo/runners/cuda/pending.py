"""Handles of work queued on a CUDA stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

ResultT = TypeVar("ResultT")


class Pending(Generic[ResultT]):
    """A result that `read` makes once the event is reached; None: there is nothing to wait for."""

    def __init__(self, event: torch.cuda.Event | None, read: Callable[[], ResultT]) -> None:
        self._event = event
        self._read = read
        self._result: list[ResultT] = []

    def done(self) -> bool:
        return self._event is None or self._event.query()

    def result(self) -> ResultT:
        if not self._result:
            if self._event is not None:
                self._event.synchronize()
            self._result.append(self._read())
        return self._result[0]
