"""What the server's processes log: ids, counts and timings on standard error, one line each.

Tracebacks, which hold paths and addresses and may quote what a user wrote, need OCTAVO_DEBUG; without it an
exception is its class's name.
"""

from __future__ import annotations

import logging
import os
import re
import sys

_PATH = re.compile(r"(?<![\w/])(?:~|/(?!/)|[A-Za-z]:\\)[^\s'\",;]+")


def without_paths(text: str) -> str:
    return _PATH.sub("(path)", text)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text.replace("\r", "\\r").replace("\n", "\\n")

    def formatException(self, ei: object) -> str:  # noqa: N802  (logging's name)
        kind = ei[0] if isinstance(ei, tuple) else None
        return "unknown" if kind is None else kind.__name__


def log_to_stderr() -> None:
    """For a process of the server; called once, by its main program."""
    debug = bool(os.environ.get("OCTAVO_DEBUG"))
    form = "%(asctime)s %(levelname)s %(process)d %(message)s"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(form) if debug else _OneLine(form))
    log = logging.getLogger("octavo")
    log.addHandler(handler)
    log.propagate = False
    log.setLevel(logging.DEBUG if debug else logging.INFO)
    # What asyncio and uvicorn say of a connection that broke would name its address.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
