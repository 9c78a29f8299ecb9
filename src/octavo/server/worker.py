"""One model in a process of its own: `python -m octavo.server.worker LINK`. Loads it, steps it, sends its events.

Synchronous. Four threads: this one loads and answers, the driver's steps the engine, the inbox's reads, so that a
front that goes away is noticed during a load too, and the outbox's writes, so that one that is slow to read never
holds a step up. The process ends when it is told to, when the front
goes away, or when its engine breaks: a front can then start another. Listens to no one but its front.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from octavo.backends.base import Backend
from octavo.backends.driver import Driver
from octavo.engine.hooks import Constraint, error_of_hook
from octavo.errors import (
    ClosedError,
    IncompatibleModelError,
    InvalidGrammarError,
    InvalidInputError,
    OctavoError,
)
from octavo.frontend import Frontend
from octavo.server import wire
from octavo.server.link import connect
from octavo.server.logs import log_to_stderr
from octavo.settings import Settings
from octavo.text.grammar import Grammars
from octavo.types import FinishReason, Grammar, ModelSource, Progress, TokenEvent
from octavo.version import __version__

BROKEN = 70
"""Exit code of a worker whose engine stopped."""
REFUSED = 69
"""Exit code of a worker whose model cannot be loaded."""
_MOST_EVENTS = 4096
"""In one message: without prompts' logprobs under a megabyte."""

_log = logging.getLogger("octavo.server")


def _nothing_to_end(token_ids: Sequence[int]) -> None:
    """Of a model that takes no grammars."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What a loader gives: the backend, where its model came from, and facts to show."""

    backend: Backend
    source: ModelSource
    max_sequences: int
    facts: Mapping[str, Any]
    notices: tuple[str, ...] = ()
    end_with: Callable[[Sequence[int]], None] = _nothing_to_end
    """Called once, before any request: what ends a text that follows a grammar."""


Loader = Callable[[Settings, Progress, Callable[[int], None]], LoadedModel]
"""(settings, progress, what to tell the bytes the plan needs, which waits until there is room) -> the model.
Raises our errors."""


class Inbox:
    """Messages of the front, read by a thread of its own. Until `loaded`, the front's end is the process's."""

    def __init__(self, connection: socket.socket) -> None:
        self._reader = connection.makefile("rb")
        self._read_ones: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._loading = True
        threading.Thread(target=self._read, name="octavo-inbox", daemon=True).start()

    def get(self) -> Any:
        """The next message. Raises EOFError at the front's end, WireError where it sent no message."""
        message = self._read_ones.get()
        if isinstance(message, Exception):
            raise message
        return message

    def loaded(self) -> None:
        self._loading = False

    def _read(self) -> None:
        message: Any = None
        while not isinstance(message, (wire.Close, Exception)):
            try:
                message = self._next()
            except OSError:
                message = EOFError()
            except Exception as error:
                message = error
            if isinstance(message, (wire.Close, EOFError)) and self._loading:
                os._exit(0)  # a load cannot be interrupted, and there is nothing to save
            self._read_ones.put(message)

    def _next(self) -> Any:
        head = self._reader.read(wire.LENGTH_BYTES)
        if len(head) < wire.LENGTH_BYTES:
            raise EOFError
        length = wire.frame_length(head)
        body = self._reader.read(length)
        if len(body) < length:
            raise EOFError
        return wire.decode(body)


class Outbox:
    """Messages on their way to the front, written by a thread of its own. Events that wait go out together.

    `unsendable` is called with the key of an event that did not fit a message: its request ends with an error.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.unsendable: Callable[[int], None] = lambda key: None
        self._connection = connection
        self._waiting: queue.SimpleQueue[bytes | wire.Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="octavo-outbox", daemon=True)
        self._thread.start()

    def put(self, message: wire.FromWorker | wire.Event) -> None:
        """Raises WireError for a message, other than an event, that cannot be sent."""
        self._waiting.put(message if isinstance(message, wire.Event) else wire.encode(message))

    def flush(self, timeout_seconds: float) -> None:
        """Write what is waiting, then nothing more."""
        self._waiting.put(None)
        self._thread.join(timeout_seconds)

    def _write(self) -> None:
        try:
            while self._write_waiting(self._waiting.get()):
                pass
        except OSError:
            pass  # the front is gone: the inbox ends the process
        except Exception:
            # Mute but alive, it would keep its clients waiting for ever.
            _log.exception("events could not be sent")
            os._exit(BROKEN)

    def _write_waiting(self, first: bytes | wire.Event | None) -> bool:
        events: list[wire.Event] = []
        message = first
        while isinstance(message, wire.Event):
            events.append(message)
            if len(events) == _MOST_EVENTS:
                break
            try:
                message = self._waiting.get_nowait()
            except queue.Empty:
                break
        if events:
            self._send(events)
        if isinstance(message, bytes):
            self._connection.sendall(message)
        return message is not None

    def _send(self, events: Sequence[wire.Event]) -> None:
        """In one message where they fit into one."""
        try:
            frame = wire.encode(wire.Events(tuple(events)))
        except wire.WireError as error:
            if len(events) > 1:
                half = len(events) // 2
                self._send(events[:half])
                self._send(events[half:])
                return
            key = events[0].key
            _log.error("request %d ends: %s", key, error)
            frame = wire.encode(
                wire.Events((wire.Event(key, finish_reason=FinishReason.ERROR, fault=_TOO_MUCH),))
            )
            self.unsendable(key)
        self._connection.sendall(frame)


_TOO_MUCH = wire.fault_of(
    InvalidInputError(
        "the answer's log-probabilities are too many to send",
        remedy="Ask for fewer of them, or give a shorter prompt.",
    )
)
_BROKE = ClosedError("the model's engine stopped", remedy="Try again: it is being restarted.")
"""For every request that was open when it did; what it raised is for the log."""


class Requests:
    """The front's keys and the engine's ids, which a request has from submission to its last event."""

    def __init__(self, driver: Driver, outbox: Outbox) -> None:
        self._driver = driver
        self._outbox = outbox
        self._ids: dict[int, int] = {}
        self._ended_early: set[int] = set()
        self._lock = threading.Lock()

    def submit(self, message: wire.Submit) -> None:
        key = message.key
        try:
            request_id = self._driver.submit(message.request, lambda event: self._deliver(key, event))
        except Exception as error:
            self._outbox.put(wire.Event(key, finish_reason=FinishReason.ERROR, fault=wire.fault_of(error)))
            return
        with self._lock:
            if key in self._ended_early:
                self._ended_early.remove(key)
            else:
                self._ids[key] = request_id

    def cancel(self, key: int) -> None:
        with self._lock:
            request_id = self._ids.get(key)
        if request_id is not None:
            self._driver.cancel(request_id)

    def _deliver(self, key: int, event: TokenEvent) -> None:
        if event.finish_reason is not None:
            with self._lock:
                if self._ids.pop(key, None) is None:
                    self._ended_early.add(key)
        if event.error is not None and event.error is self._driver.failure:
            event = dataclasses.replace(event, error=_BROKE)
        self._outbox.put(wire.event_of(key, event))


def serve(connection: socket.socket, load: Loader) -> int:
    """Serve one model over `connection` until it closes; the exit code."""
    outbox = Outbox(connection)
    inbox = Inbox(connection)

    def planned(needed_bytes: int) -> None:
        outbox.put(wire.Planned(needed_bytes))
        if not isinstance(inbox.get(), wire.Proceed):
            raise EOFError

    try:
        first = inbox.get()
        if not isinstance(first, wire.Load) or first.version != __version__:
            return REFUSED
        model = load(
            settings_from(first.settings),
            lambda *about: outbox.put(wire.Loading(*about)),
            planned,
        )
        driver = Driver(model.backend)
        try:
            outbox.put(ready_message(model))
        except wire.WireError as error:
            driver.close()
            raise IncompatibleModelError(
                f"the model's configuration cannot be handed to the server: {error}",
                remedy="Take the number or list it speaks of out of config.json.",
            ) from error
    except EOFError:
        return 0
    except Exception as error:
        if not isinstance(error, (OctavoError, OSError)):
            _log.exception("loading failed")
        outbox.put(wire.Failed(wire.fault_of(error)))
        outbox.flush(5)
        return REFUSED
    inbox.loaded()
    threading.Thread(target=_end_with, args=(driver, outbox), name="octavo-watch", daemon=True).start()
    try:
        return _answer(inbox, driver, outbox, model.end_with)
    finally:
        driver.close()
        outbox.flush(2)


def _end_with(driver: Driver, outbox: Outbox) -> None:
    """A broken engine ends the process once every request has been told: its memory is then free for another."""
    if driver.wait() is not None:
        outbox.flush(5)
        os._exit(BROKEN)


def _answer(inbox: Inbox, driver: Driver, outbox: Outbox, end_with: Callable[[Sequence[int]], None]) -> int:
    requests = Requests(driver, outbox)
    outbox.unsendable = requests.cancel
    while True:
        try:
            message = inbox.get()
        except EOFError:
            return 0
        match message:
            case wire.Submit():
                requests.submit(message)
            case wire.Cancel():
                requests.cancel(message.key)
            case wire.Ends():
                end_with(message.token_ids)
            case wire.AskFacts():
                outbox.put(wire.Facts(wire.finite({**driver.backend.info(), "process": _own_memory()})))
            case wire.Close():
                return 0
            case _:
                raise wire.WireError(f"a front does not send {type(message).__name__}")


def ready_message(model: LoadedModel) -> wire.Ready:
    source, able = model.source, model.backend.capabilities
    return wire.Ready(
        location=source.location,
        revision=source.revision,
        config=source.config,
        generation_config=source.generation_config,
        tokenizer=source.tokenizer,
        chat_template=source.chat_template,
        fingerprint=source.fingerprint,
        vocab_size=able.vocab_size,
        context_tokens=able.context_tokens,
        max_sequences=model.max_sequences,
        grammars=able.grammars,
        facts=wire.finite(model.facts),
        notices=model.notices,
    )


def settings_from(values: Mapping[str, Any]) -> Settings:
    """`Settings` as `Load` carries them; `octavo.loading` checks the values."""
    known = {each.name for each in fields(Settings)}
    given = {name: value for name, value in values.items() if name in known}
    if given.get("cache_dir") is not None:
        given["cache_dir"] = Path(given["cache_dir"])
    return Settings(**given)


class WorkerGrammars:
    """Grammars, once it is known which tokens end a text."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._grammars: Grammars | None = None

    def end_with(self, token_ids: Sequence[int]) -> None:
        """Reads the vocabulary: now, not between two tokens of someone."""
        self._grammars = Grammars(
            self._frontend.require_tokenizer(),
            vocab_size=self._frontend.vocab_size,
            end_token_ids=token_ids,
        )
        try:
            self._grammars.read_vocabulary()
        except InvalidGrammarError:
            pass  # a model without an end refuses each grammar by itself
        except BaseException as error:
            error_of_hook(error)  # requests with a grammar meet it again, and those without never
            _log.exception("the vocabulary cannot be read for grammars")

    def constraint(self, grammar: Grammar) -> Constraint:
        """As `octavo.text.grammar.Grammars.constraint`."""
        assert self._grammars is not None, "the front says what ends a text before it sends requests"
        return self._grammars.constraint(grammar)


def load_model(settings: Settings, progress: Progress, planned: Callable[[int], None]) -> LoadedModel:
    """The real thing: `octavo.loading`, with the plan's bytes told before anything is taken."""
    from octavo.load_facts import load_facts, load_notices
    from octavo.loading import load_backend, plan_model

    model = plan_model(settings, progress=progress)
    planned(sum(pool.needed_bytes for pool in model.plan.pools))
    plan, source = model.plan, model.source
    # The front's twin, without the template: the front knows what that ends a turn with.
    frontend = Frontend(
        dataclasses.replace(source, chat_template=None),
        vocab_size=model.spec.vocab_size,
        context_tokens=plan.context.tokens,
    )
    grammars = None if frontend.tokenizer is None else WorkerGrammars(frontend)
    loaded = load_backend(
        model, compile_grammar=None if grammars is None else grammars.constraint, progress=progress
    )
    facts = {
        **load_facts(model),
        "packed_from_cache": loaded.packed_from_cache,
        "weights_bytes": plan.packed_bytes,
    }
    notices = load_notices(model, frontend.notices, loaded)
    end_with = _nothing_to_end if grammars is None else grammars.end_with
    return LoadedModel(loaded.backend, source, plan.config.max_slots, facts, notices, end_with)


def _own_memory() -> Mapping[str, int]:
    """Anonymous and swapped bytes of this process: what a leak would make grow. Linux only, since /proc is."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name in ("RssAnon", "VmSwap", "VmRSS"):
                found[name] = int(value.split()[0]) * 1024
    return found


def main(arguments: list[str], load: Loader = load_model) -> int:
    """`arguments`: what `octavo.server.link.connect` takes."""
    log_to_stderr()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front's to handle: it drains
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return serve(connect(arguments[0]), load)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # nothing is left to save, and a library's thread must not hold the exit up
