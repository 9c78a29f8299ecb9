"""Weights on their way to the device: threads copy from the mapped file into pinned pieces, and send them on.

A thread fills one of its two pieces while the other is on the bus, so neither waits for the other. Nothing is
there before the context is left, though what is queued on the stream afterwards finds it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from types import TracebackType
from typing import Self

import numpy as np
import torch

THREADS = 4
PIECE_BYTES = 8 << 20
_BUNDLES_BEHIND = 4
"""How many uploads may be under way before the oldest one's source is given back."""


class Uploads:
    """Copies arrays to one device. Used as a context; leaving it without an error waits for all."""

    def __init__(self, device: torch.device) -> None:
        self.nbytes = 0
        """Of all tensors made."""
        self._device = device
        self._pool = ThreadPoolExecutor(THREADS, "octavo-upload")
        self._own = threading.local()
        self._jobs: list[Future[None]] = []
        """Of the bundle at hand."""
        self._behind: deque[tuple[list[Future[None]], Callable[[], None]]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.then(lambda: None)
                self._settle(0)
        finally:
            self._pool.shutdown(cancel_futures=True)

    def upload(self, arrays: Sequence[np.ndarray]) -> torch.Tensor:
        """uint8 [bytes] on the device: the arrays' bytes, one after the other, once they are there."""
        whole = torch.empty(sum(array.nbytes for array in arrays), dtype=torch.uint8, device=self._device)
        place = 0
        for array in arrays:
            flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            for first in range(0, len(flat), PIECE_BYTES):
                piece = flat[first : first + PIECE_BYTES]
                self._jobs.append(self._pool.submit(self._send, piece, whole[place : place + len(piece)]))
                place += len(piece)
        self.nbytes += whole.nbytes
        return whole

    def then(self, release: Callable[[], None]) -> None:
        """Call `release` once what was uploaded since the last call has been read."""
        self._behind.append((self._jobs, release))
        self._jobs = []
        self._settle(_BUNDLES_BEHIND)

    def _settle(self, most: int) -> None:
        while len(self._behind) > most:
            jobs, release = self._behind.popleft()
            for job in jobs:
                job.result()
            release()

    def _send(self, piece: np.ndarray, target: torch.Tensor) -> None:
        on_card = self._device.type == "cuda"
        # The target may have been made in inference mode, which is a thread's own.
        with torch.inference_mode(), torch.cuda.device(self._device) if on_card else nullcontext():
            staging = self._staging(on_card)
            buffer, sent = staging[0]
            staging.rotate()
            if sent is not None:
                sent.synchronize()
            staged = buffer[: len(piece)]
            np.copyto(staged.numpy(), piece)
            target.copy_(staged, non_blocking=True)
            if sent is not None:
                sent.record()

    def _staging(self, on_card: bool) -> deque[tuple[torch.Tensor, torch.cuda.Event | None]]:
        """This thread's two pieces, each with the event behind its last copy."""
        if not hasattr(self._own, "staging"):
            self._own.staging = deque(
                (
                    torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=on_card),
                    torch.cuda.Event() if on_card else None,
                )
                for _ in range(2)
            )
        staging: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = self._own.staging
        return staging
