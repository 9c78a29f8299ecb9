"""The `octavo` command, also as `python -m octavo`. Imports next to nothing before an interrupt is quiet."""

from __future__ import annotations

import gc
import os
import signal
from typing import NoReturn


def run() -> NoReturn:
    # What a start makes stays: collecting garbage among it is a tenth of the processor time to the first token.
    gc.set_threshold(100_000)
    # Until the command's own handling is there, Ctrl-C would print a traceback of some import.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        from octavo.cli import main

        signal.signal(signal.SIGINT, signal.default_int_handler)
    else:  # ignored, as in the background of a shell without job control
        from octavo.cli import main
    main.run()


if __name__ == "__main__":
    run()
