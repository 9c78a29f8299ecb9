"""`python -m octavo.server.capped MEMORY_BYTES CPU_SECONDS MODULE-OR-SCRIPT ...`: cap this process, become that one."""

from __future__ import annotations

import os
import resource
import sys


def main(arguments: list[str]) -> None:
    """0 is no cap. Never writes a core file, which would hold what users wrote."""
    memory_bytes, cpu_seconds, *command = arguments
    for kind, most in (
        (resource.RLIMIT_AS, int(memory_bytes)),
        (resource.RLIMIT_CPU, int(cpu_seconds)),
    ):
        if most:
            resource.setrlimit(kind, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    main(sys.argv[1:])
