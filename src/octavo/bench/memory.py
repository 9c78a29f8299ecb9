"""What memory this process holds, as the operating system counts it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_LINUX_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    peak_bytes: int | None
    """Most that was ever resident: anonymous memory and mapped files together."""
    anonymous_bytes: int | None
    """Resident now and nobody else's. None where only Linux says."""
    mapped_bytes: int | None
    """Resident now and of files, which the system may drop and other processes share. None likewise."""


def process_memory() -> ProcessMemory:
    if sys.platform == "linux":
        return from_status(_LINUX_STATUS.read_text(encoding="ascii", errors="replace"))
    if sys.platform == "win32":
        import psutil

        return ProcessMemory(int(psutil.Process().memory_info().peak_wset), None, None)
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return ProcessMemory(most if sys.platform == "darwin" else most << 10, None, None)


def from_status(text: str) -> ProcessMemory:
    """From what /proc/PID/status says. A line that is missing (an old kernel, a sandbox) is None."""
    kib = {
        name: int(value.split()[0])
        for name, _, value in (line.partition(":") for line in text.splitlines())
        if value.endswith(" kB")
    }
    return ProcessMemory(_bytes(kib, "VmHWM"), _bytes(kib, "RssAnon"), _bytes(kib, "RssFile"))


def _bytes(kib: Mapping[str, int], name: str) -> int | None:
    return kib[name] << 10 if name in kib else None
