"""A model's `Frontend` in the front's process, with what strangers wrote run in children: its template, their grammars.

One for each loaded model, with children of its own: what one model's template does to its child is no other's trouble.
"""

from __future__ import annotations

import logging

from octavo.frontend import Frontend
from octavo.output_filter import OutputFilter
from octavo.server import wire
from octavo.server.child_renderer import ChildRenderer
from octavo.server.grammar_checker import GrammarChecker
from octavo.server.settings import LinkName
from octavo.types import Grammar, ModelSource

_log = logging.getLogger(__name__)


class ConfinedFrontend:
    """`build` once, beside the loop; `close` at any time."""

    def __init__(self, ready: wire.Ready, output_filter: OutputFilter | None, link: LinkName) -> None:
        self._ready = ready
        self._output_filter = output_filter
        self._link = link
        self._renderer: ChildRenderer | None = None
        self._checker: GrammarChecker | None = None
        self._frontend: Frontend | None = None
        self._warms = True

    @property
    def frontend(self) -> Frontend:
        assert self._frontend is not None
        return self._frontend

    def build(self) -> None:
        """Raises what `Frontend` raises."""
        ready = self._ready
        self._frontend = Frontend(
            ModelSource(
                location=ready.location,
                revision=ready.revision,
                naming="huggingface",
                config=ready.config,
                generation_config=ready.generation_config,
                tokenizer=ready.tokenizer,
                chat_template=ready.chat_template,
                tensors={},
                fingerprint=ready.fingerprint,
            ),
            vocab_size=ready.vocab_size,
            context_tokens=ready.context_tokens,
            output_filter=self._output_filter,
            make_renderer=self._make_renderer,
            check_grammar=self._check_grammar,
        )
        if ready.tokenizer is not None:
            self._checker = GrammarChecker(
                ready.tokenizer,
                vocab_size=ready.vocab_size,
                end_token_ids=self._frontend.stop_token_ids,
                link=self._link,
            )

    def tend(self, *, idle: bool) -> None:
        """Now and then: end children that stand about, and where the model is `idle` be ready for the first grammar."""
        if idle and self._warms and self._checker is not None and self._ready.grammars:
            try:
                self._checker.warm()
            except Exception as error:  # the next grammar tries again, and says what is wrong
                self._warms = False
                _log.warning("no child process for grammars could be kept ready: %s", type(error).__name__)
        for each in (self._renderer, self._checker):
            if each is not None:
                each.children.trim()

    def close(self) -> None:
        for each in (self._renderer, self._checker):
            if each is not None:
                each.close()

    def _make_renderer(self, source: str) -> ChildRenderer:
        self._renderer = ChildRenderer(source, link=self._link)
        return self._renderer

    def _check_grammar(self, grammar: Grammar) -> None:
        assert self._checker is not None
        self._checker.check(grammar)
