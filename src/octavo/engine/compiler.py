"""Compiles grammars on a thread beside the step loop, so that a slow one delays its own request only.

How much time and memory compiling may take is the given function's business. Not thread-safe itself: the step
loop's thread calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from octavo.engine.hooks import CompileGrammar, Constraint, error_of_hook
from octavo.engine.sequence import Sequence

_THREADS = 2


class GrammarCompiler:
    """`wake` is called, on any thread, when there is something to take."""

    def __init__(self, compile_grammar: CompileGrammar, wake: Callable[[], None]) -> None:
        self._compile = compile_grammar
        self._wake = wake
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="octavo-grammar")
        self._futures: dict[Sequence, Future[Constraint]] = {}

    def __len__(self) -> int:
        """Sequences whose grammar was started and not taken."""
        return len(self._futures)

    def start(self, sequence: Sequence) -> None:
        grammar = sequence.request.grammar
        assert grammar is not None
        self._futures[sequence] = future = self._threads.submit(self._compile, grammar)
        future.add_done_callback(lambda _: self._wake())

    def drop(self, sequence: Sequence) -> None:
        """Its request has ended: what is being compiled for it is not wanted. No effect once it was taken."""
        future = self._futures.pop(sequence, None)
        if future is not None:
            future.cancel()

    def any_done(self) -> bool:
        return any(future.done() for future in self._futures.values())

    def take_done(self) -> list[tuple[Sequence, Constraint | Exception]]:
        """Those that are compiled, or why they could not be, in order of arrival."""
        taken: list[tuple[Sequence, Constraint | Exception]] = []
        for sequence, future in list(self._futures.items()):
            if future.done():
                del self._futures[sequence]
                try:
                    taken.append((sequence, future.result()))
                except BaseException as error:
                    taken.append((sequence, error_of_hook(error)))
        return taken

    def close(self) -> None:
        """Wait for nothing: what is still being compiled is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)
