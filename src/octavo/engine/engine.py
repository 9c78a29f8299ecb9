"""The engine's doors: requests come in from any thread, one thread steps, events and counters come out.

What a step does is loop.py's, what it computes is scheduler.py's. docs/engine.md says what users may rely on.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Any

from octavo.engine.compiler import GrammarCompiler
from octavo.engine.hooks import CompileGrammar, MakeDrafter
from octavo.engine.loop import StepLoop
from octavo.engine.prefix import extend_keys, root_key
from octavo.engine.scheduler import Scheduler
from octavo.engine.sequence import Sequence
from octavo.engine.speculation import Speculation
from octavo.errors import ClosedError, ContextLengthError, EmptyPromptError, InvalidParameterError
from octavo.models.spec import ModelSpec
from octavo.runners.base import Adapter, Runner, RunnerConfig
from octavo.types import Request, TokenEvent

MIXED_PREFILL_TOKENS = 64
"""How many tokens of a prompt a step takes while other sequences decode: what it delays their next token by."""


class Engine:
    """Runs requests on a runner, which it owns. Thread-safe but for `step`, which one thread calls.

    `weights_digest` identifies weights and format (the root of prefix keys). `reuse_prefixes` False: nothing is
    computed from what others left behind. `compile_grammar` None: requests with a grammar are refused.
    `make_drafter` gives each sequence a drafter, whose guesses are verified; none is made where the runner's
    results depend on how tokens are cut into chunks, since that would change what is generated. `clock` counts seconds.
    """

    def __init__(
        self,
        runner: Runner,
        config: RunnerConfig,
        spec: ModelSpec,
        weights_digest: str,
        *,
        reuse_prefixes: bool = True,
        mixed_prefill_tokens: int = MIXED_PREFILL_TOKENS,
        compile_grammar: CompileGrammar | None = None,
        make_drafter: MakeDrafter | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._runner = runner
        self._weights_digest = weights_digest
        self._reuse_prefixes = reuse_prefixes
        self._clock = clock
        self._ids = itertools.count()
        self._mail = threading.Condition()
        """Guards what other threads leave for the next step: `_submitted`, `_closed`; and `_adapters`."""
        self._submitted: list[Sequence] = []
        self._closed = False
        self._adapters: dict[str, str] = {}
        """Name -> digest of its content."""
        self._cancelled: SimpleQueue[int] = SimpleQueue()
        """Without a lock: an abandoned stream cancels from its destructor, which may run wherever the garbage
        collector does, in a thread that holds one of ours. SimpleQueue.put is reentrant."""

        self._work = threading.Lock()
        """Guards everything below and the runner; held for a step's work, not while waiting for some."""
        self._scheduler = Scheduler(
            spec.kv_groups,
            config.kv_pages,
            config.max_slots,
            config.prefill_chunk_tokens,
            mixed_prefill_tokens,
        )
        self._context_tokens = self._scheduler.paging.longest_tokens(config.context_tokens)
        self._compiler = None if compile_grammar is None else GrammarCompiler(compile_grammar, self._wake)
        self._make_drafter = make_drafter if runner.info.may_speculate else None
        self._loop = StepLoop(runner, self._scheduler, compiler=self._compiler, clock=clock)
        self._released = False

    @property
    def context_tokens(self) -> int:
        """Longest sequence, prompt and new tokens together: the context, or less where the pages hold less."""
        return self._context_tokens

    # --- any thread --------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """Queue a request; returns its id.

        Raises EmptyPromptError, ContextLengthError where prompt and new tokens exceed `context_tokens`,
        InvalidParameterError for an adapter that is not loaded or a grammar where none can be compiled, and
        ClosedError after `close`.
        """
        self._check_lengths(request)
        if request.grammar is not None and self._compiler is None:
            raise InvalidParameterError(
                "this model takes no grammars", remedy="Leave the grammar out.", parameter="grammar"
            )
        digest = self._adapter_digest(request.adapter)
        root = root_key(self._weights_digest, digest, request.salt) if self._reuse_prefixes else b""
        sequence = Sequence(next(self._ids), request, self._clock(), root)
        if root:  # hashed here, on the caller's thread
            extend_keys(sequence.keys, root, request.prompt_token_ids)
        if self._make_drafter is not None and not sequence.lockstep:
            sequence.speculation = Speculation(self._make_drafter())
        with self._mail:
            if self._closed:
                raise ClosedError("the engine is closed", remedy="Load the model again.")
            if self._adapter_digest(request.adapter) != digest:
                raise _no_adapter(request.adapter, self._adapters)  # dropped just now
            self._submitted.append(sequence)
            self._mail.notify()
        return sequence.request_id

    def _check_lengths(self, request: Request) -> None:
        prompt_tokens = len(request.prompt_token_ids)
        if not prompt_tokens:
            raise EmptyPromptError(
                "the prompt has no tokens", remedy="Give at least one token, e.g. the model's BOS."
            )
        if prompt_tokens + request.max_new_tokens > self._context_tokens:
            raise ContextLengthError(
                f"a prompt of {prompt_tokens} tokens and {request.max_new_tokens} new ones exceed "
                f"the context of {self._context_tokens} tokens",
                remedy="Shorten the prompt, lower --max-new-tokens or raise --context.",
                prompt_tokens=prompt_tokens,
                context_tokens=self._context_tokens,
            )

    def _adapter_digest(self, name: str | None) -> str | None:
        if name is None:
            return None
        with self._mail:
            if name not in self._adapters:
                raise _no_adapter(name, self._adapters)
            return self._adapters[name]

    def cancel(self, request_id: int) -> None:
        """End a request at the next step. No effect where it has ended or never was. Takes no lock."""
        if not self._closed:
            # Wakes nobody: while there is a request to cancel steps go on, or wait for its grammar, not for long.
            self._cancelled.put(request_id)

    def load_adapter(self, name: str, adapter: Adapter) -> None:
        """Make an adapter available to requests. Raises InvalidParameterError where the name is taken, and what
        the runner refuses with."""
        with self._work:
            with self._mail:
                if name in self._adapters:
                    raise InvalidParameterError(
                        f"there is an adapter {name!r} already", remedy="Drop it first.", parameter="adapter"
                    )
            self._runner.load_adapter(name, adapter)
            with self._mail:
                self._adapters[name] = adapter.digest

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter. Raises InvalidParameterError where there is none, or a request uses it."""
        with self._work:
            with self._mail:
                self._adapter_digest(name)
                self._collect_mail()
                live = any(s.request.adapter == name for s in self._loop.live.values())
                if live or self._scheduler.uses_adapter(name):
                    raise InvalidParameterError(
                        f"a request uses the adapter {name!r}",
                        remedy="Wait until it has ended, or cancel it.",
                        parameter="adapter",
                    )
                del self._adapters[name]
            self._runner.drop_adapter(name)

    def info(self) -> dict[str, Any]:
        """Counters since the start, sequences now, and the runner's memory and counters: docs/engine.md."""
        with self._work:
            loop, scheduler, pool = self._loop, self._scheduler, self._scheduler.paging.pool
            compiling = 0 if self._compiler is None else len(self._compiler)
            return {
                "weights_digest": self._weights_digest,
                "context_tokens": self._context_tokens,
                "steps": loop.steps,
                "prompt_tokens": loop.prompt_tokens,
                "generated_tokens": loop.generated_tokens,
                "surplus_tokens": loop.surplus_tokens,
                "faults": loop.faults,
                "waiting": scheduler.waiting + compiling + len(self._submitted),
                "running": scheduler.active,
                "preemptions": scheduler.preemptions,
                "prefix_reuse": self._reuse_prefixes,
                "prefix_queried_tokens": scheduler.prefix_queried_tokens,
                "prefix_hit_tokens": scheduler.prefix_hit_tokens,
                "prefix_evicted_pages": pool.evictions,
                "pages": {
                    "total": list(pool.total),
                    "free": list(pool.free),
                    "used": list(pool.used),
                    "cached": list(pool.cached),
                },
                "speculation": self._make_drafter is not None,
                "drafts_proposed": loop.proposed_drafts,
                "drafts_accepted": loop.accepted_drafts,
                "memory": {} if self._released else dict(self._runner.memory()),
                "compiled": self._runner.counters(),
            }

    def check(self) -> None:
        """Raise AssertionError unless every page and slot is free, cached or held by live requests."""
        with self._work:
            self._scheduler.check()

    def close(self) -> None:
        """End every request with a ClosedError event, which the next `step` returns, and close the runner.
        Waits for the step in flight. Idempotent."""
        with self._mail:
            self._closed = True
            self._mail.notify_all()
        with self._work:
            if self._released:
                return
            self._released = True
            self._collect_mail()
            self._loop.end_all(
                ClosedError("the engine was closed during this request", remedy="Load the model again.")
            )
            if self._compiler is not None:
                self._compiler.close()
            self._runner.close()

    def _wake(self) -> None:
        with self._mail:
            self._mail.notify()

    # --- the stepping thread -----------------------------------------------------------------------

    def step(self, timeout_seconds: float) -> list[TokenEvent]:
        """Do one step of work, waiting at most `timeout_seconds` for some to arrive; [] when there was none."""
        if not (self._loop.busy or self._submitted):
            with self._mail:
                self._mail.wait_for(self._has_work, timeout_seconds)
        with self._work:
            if not self._released:
                self._collect_mail()
                self._loop.advance()
            return self._loop.take_events()

    def _has_work(self) -> bool:
        compiled = self._compiler is not None and self._compiler.any_done()
        return bool(self._submitted or self._closed or compiled)

    def _collect_mail(self) -> None:
        # Before the submitted ones: who is cancelled here is among them at the latest.
        cancelled = [self._cancelled.get_nowait() for _ in range(self._cancelled.qsize())]
        if self._submitted:
            with self._mail:
                submitted, self._submitted = self._submitted, []
            for sequence in submitted:
                self._loop.add(sequence)
        for request_id in cancelled:
            self._loop.cancel(request_id)


def _no_adapter(name: str | None, loaded: Iterable[str]) -> InvalidParameterError:
    return InvalidParameterError(
        f"there is no adapter {name!r}; loaded: {', '.join(sorted(loaded)) or 'none'}",
        remedy="Load it first, or leave it out.",
        parameter="adapter",
    )
