"""What NVIDIA's management library says of a card: memory, whose it is, and energy. Decides nothing.

Through the optional package nvidia-ml-py (its module is pynvml): without it, or where a driver refuses a question
(some containers, WSL, MIG), that answer is missing and nothing else changes.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class CardProcess:
    pid: int
    """As the driver numbers it: in a container, not as the container does."""
    used_bytes: int | None
    """None where the driver does not say."""


@dataclass(frozen=True, slots=True)
class CardState:
    total_bytes: int
    free_bytes: int
    others: tuple[CardProcess, ...]
    """Processes with memory on the card, without this one; largest first."""
    energy_joules: float | None
    """Since the driver was loaded."""

    @property
    def others_bytes(self) -> int:
        return sum(each.used_bytes or 0 for each in self.others)

    def to_json(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers."""
        return {
            "total_bytes": self.total_bytes,
            "free_bytes": self.free_bytes,
            "others_bytes": self.others_bytes,
            "others": [{"pid": each.pid, "used_bytes": each.used_bytes} for each in self.others],
            "energy_joules": self.energy_joules,
        }


class CardReader:
    """One card, asked as often as wanted until `close`."""

    def __init__(self, library: Any, handle: Any) -> None:
        self._library = library
        self._handle = handle

    def read(self) -> CardState | None:
        """None where not even memory is told."""
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        if memory is None:
            return None
        millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return CardState(
            total_bytes=int(memory.total),
            free_bytes=int(memory.free),
            others=self._others(),
            energy_joules=None if millijoules is None else millijoules / 1000,
        )

    def close(self) -> None:
        """Idempotent."""
        if self._library is not None:
            with contextlib.suppress(self._library.NVMLError):
                self._library.nvmlShutdown()
        self._library = None

    def _others(self) -> tuple[CardProcess, ...]:
        used: dict[int, int | None] = {}
        for question in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
            for each in self._ask(question) or ():
                used[each.pid] = each.usedGpuMemory
        used.pop(os.getpid(), None)
        others = [CardProcess(pid, nbytes) for pid, nbytes in used.items()]
        return tuple(sorted(others, key=lambda each: (-(each.used_bytes or 0), each.pid)))

    def _ask(self, question: str) -> Any:
        if self._library is None:
            return None
        try:
            return getattr(self._library, question)(self._handle)
        except self._library.NVMLError:
            return None


def open_card(
    pci_bus_id: str, load: Callable[[], Any] = lambda: importlib.import_module("pynvml")
) -> CardReader | None:
    """The card with that bus id, as the driver's 0000:65:00.0; None where there is nobody to ask.

    `load` gives the module pynvml; tests replace it.
    """
    try:
        library = load()
    except ImportError:
        return None
    try:
        library.nvmlInit()
    except library.NVMLError:
        return None
    try:
        return CardReader(library, library.nvmlDeviceGetHandleByPciBusId(pci_bus_id))
    except library.NVMLError:
        library.nvmlShutdown()
        return None
