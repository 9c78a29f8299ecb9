"""`octavo serve` in a process of its own, with the fake worker or (`"real": true`) a real one: run by path, prints its
port when it listens."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from octavo.server.access import Keys
from octavo.server.logs import log_to_stderr
from octavo.server.models import ServedModel
from octavo.server.run import serve
from octavo.server.settings import ServerSettings
from octavo.server.worker_link import WORKER_COMMAND
from octavo.settings import SamplingParams, Settings

if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    real = options.pop("real", False)
    # A small context of a real one: pages of the KV cache count as memory when they are first used.
    size = {"context": 1024} if real else {"context": 4096, "max_sequences": 64}
    model = Settings(model=options.pop("model", "fake"), **size)
    log_to_stderr()
    serve(
        ServerSettings(port=0, **options),
        [ServedModel("fake", (), model, SamplingParams())],
        Keys(()),
        lambda port: print(port, flush=True),
        command=WORKER_COMMAND if real else (str(Path(__file__).with_name("fake_worker.py")),),
    )
