"""A server in a thread, in front of fake workers that fail on demand or of the default model; and its clients."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from octavo.server.access import NO_KEYS, Keys
from octavo.server.models import ServedModel
from octavo.server.run import Server
from octavo.server.settings import ServerSettings
from octavo.server.worker_link import WORKER_COMMAND
from octavo.settings import SamplingParams, Settings

FAKE_WORKER = (str(Path(__file__).with_name("fake_worker.py")),)
KEY = "test-key-0123456789"


class Harness:
    """A running server. `model` is the first one's name."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop, port: int, model: str) -> None:
        self.server, self.loop, self.port, self.model = server, loop, port, model
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    @property
    def service(self) -> Any:
        return self.server.service

    def call(self, work: Any) -> Any:
        """Run a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def engine(self, model: str | None = None) -> dict[str, Any]:
        resident = self.service.models.resident(model or self.model)
        return dict(self.call(resident.link.facts()).get("engine", {}))

    def wait_ready(self, seconds: float = 30) -> None:
        until(lambda: self.client.get("/ready").status_code == 200, seconds)

    def chat(self, content: str, **more: Any) -> httpx.Response:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 32,
            **more,
        }
        return self.client.post("/v1/chat/completions", json=body)

    def complete(self, prompt: Any, **more: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={"model": self.model, "prompt": prompt, **more})


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to be in time"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    return until


def served_model(name: str = "fake", model: str = "fake", **settings: Any) -> ServedModel:
    given = {"model": model, "max_sequences": 8, "context": 512, **settings}
    return ServedModel(name, (), Settings(**given), SamplingParams())


@contextlib.contextmanager
def running_server(
    *served: ServedModel,
    keys: Keys = NO_KEYS,
    admin_keys: Keys = NO_KEYS,
    command: Any = FAKE_WORKER,
    **settings: Any,
) -> Iterator[Harness]:
    started: Any = threading.Event()
    found: dict[str, Any] = {}

    async def main() -> None:
        found["loop"] = asyncio.get_running_loop()
        models = served or (served_model(),)
        server = found["server"] = Server(
            ServerSettings(**{"port": 0, "drain_seconds": 1, **settings}),
            models,
            keys,
            admin_keys=admin_keys,
            command=command,
        )

        def note(port: int) -> None:
            found["port"] = port
            started.set()

        await server.run(note)

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            found["error"] = error
            started.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(30)
    if "error" in found:
        raise found["error"]
    models = served or (served_model(),)
    harness = Harness(found["server"], found["loop"], found["port"], models[0].name)
    try:
        yield harness
    finally:
        harness.client.close()
        found["loop"].call_soon_threadsafe(found["server"].stop)
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"
        if "error" in found:
            raise found["error"]


@pytest.fixture(scope="session")
def serving() -> Any:
    """`with serving(served("name"), **ServerSettings fields) as harness`"""
    return running_server


@pytest.fixture(scope="session")
def served() -> Any:
    return served_model


@pytest.fixture(scope="session")
def api_key() -> str:
    return KEY


@pytest.fixture(scope="module")
def fake_module() -> Iterator[Harness]:
    with running_server() as harness:
        harness.wait_ready()
        yield harness


@pytest.fixture
def fake(fake_module: Harness) -> Iterator[Harness]:
    """A fake model behind a real server; after each test nothing of it is left (figure 3)."""
    yield fake_module
    assert_idle(fake_module)


@pytest.fixture(scope="session")
def check_idle() -> Callable[[Harness], None]:
    return assert_idle


def assert_idle(harness: Harness) -> None:
    """Figure 3: nothing runs, waits or is held, in the front and in the worker."""
    until(lambda: harness.server.app.open == 0, 30)  # a backlog of connections may be left
    resident = harness.service.models.resident(harness.model)
    until(lambda: resident.link.open_requests == 0, 5)

    def worker_is_idle() -> bool:
        engine = harness.engine()
        return engine["running"] == 0 and engine["waiting"] == 0

    until(worker_is_idle, 5)
    assert (harness.service.queue.waiting, harness.service.queue.waiting_tokens) == (0, 0)


@contextlib.contextmanager
def probed_health(harness: Harness) -> Iterator[list[float]]:
    """Seconds that /health took, asked again and again meanwhile; sorted at the end."""
    lags: list[float] = []
    over = threading.Event()

    def probe() -> None:
        while not over.is_set():
            started = time.perf_counter()
            assert harness.client.get("/health").status_code == 200
            lags.append(time.perf_counter() - started)
            time.sleep(0.02)

    prober = threading.Thread(target=probe)
    prober.start()
    try:
        yield lags
    finally:
        over.set()
        prober.join()
        lags.sort()


@pytest.fixture(scope="session")
def health_probe() -> Any:
    return probed_health


@pytest.fixture(scope="session")
def default_server(default_model_path: Path) -> Iterator[Harness]:
    model = served_model("smollm2", str(default_model_path), context=1024, threads=1)
    with running_server(model, command=WORKER_COMMAND) as harness:
        harness.wait_ready(120)
        yield harness


@pytest.fixture(scope="session")
def default_tokenizer_source(default_model_path: Path) -> Any:
    """(tokenizer, V, ids that end a text) of the default model"""
    from octavo.frontend import Frontend
    from octavo.sources.resolve import resolve

    source = resolve(str(default_model_path), progress=lambda *about: None)
    frontend = Frontend(source, vocab_size=49_152, context_tokens=512)
    return source.tokenizer, frontend.vocab_size, frontend.stop_token_ids
