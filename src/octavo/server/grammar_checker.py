"""Compiles a stranger's grammar for the first time in a child process, which is killed where it goes on for ever.

What compiled there is compiled again by the worker that follows it: a parser is a pointer into its library, of which
nothing can be sent, and one that was made within these limits is made within them again. What the child does is
`octavo.server.grammar_child`'s.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections import OrderedDict

from octavo.errors import ClosedError, InvalidGrammarError, OctavoError
from octavo.server import wire
from octavo.server.settings import LinkName
from octavo.server.warm_children import ChildLostError, WarmChildren
from octavo.types import Grammar, TokenizerSource

_SECONDS = 10.0
_MOST_CHILDREN = 2
"""A vocabulary of 49,152 tokens takes 63 MB in each."""
_COMMAND = ("-m", "octavo.server.grammar_child")
_KNOWN = 4096
"""Digests of grammars that compiled, or were too much: requests tend to repeat them."""


class GrammarChecker:
    """Says whether a grammar compiles for one vocabulary. Thread-safe. The child starts with the first question, or
    with `warm`."""

    def __init__(
        self,
        tokenizer: TokenizerSource,
        *,
        vocab_size: int,
        end_token_ids: frozenset[int],
        link: LinkName = "auto",
    ) -> None:
        set_up = wire.Vocabulary(tokenizer, vocab_size, tuple(sorted(end_token_ids)))
        self.children = WarmChildren(_COMMAND, set_up, seconds=_SECONDS, most=_MOST_CHILDREN, link=link)
        self._known: OrderedDict[bytes, str | None] = OrderedDict()
        """Why a grammar was too much; None: it compiles."""
        self._lock = threading.Lock()

    def check(self, grammar: Grammar) -> None:
        """Raises InvalidGrammarError where it does not compile, says what cannot be kept, or takes too much, and
        NoChildError."""
        if grammar.kind == "anything":
            return
        digest = hashlib.sha256(
            "\0".join((grammar.kind, grammar.after_reasoning, grammar.text)).encode()
        ).digest()
        with self._lock:
            known = digest in self._known
            if known:
                self._known.move_to_end(digest)
            reason = self._known.get(digest)
        if reason is not None:
            raise _too_much(reason)
        if known:
            return
        # A budget's mask is not the grammar's.
        question = wire.Check(dataclasses.replace(grammar, reasoning_tokens=None))
        try:
            answer = self.children.ask(question)
        except ChildLostError as lost:
            self._remember(digest, lost.reason)
            raise _too_much(lost.reason) from None
        if isinstance(answer, wire.Refused):
            error = wire.error_from(answer.fault)
            raise _too_much(error.message) if type(error) is OctavoError else error
        if not isinstance(answer, wire.Done):
            raise ClosedError("a grammar could not be checked", remedy="Try again.")
        self._remember(digest, None)

    def warm(self) -> None:
        """Before the first grammar comes, which would wait for a child to read the vocabulary. Raises what
        `octavo.server.warm_children.WarmChildren.warm` raises."""
        self.children.warm()

    def close(self) -> None:
        self.children.close()

    def _remember(self, digest: bytes, reason: str | None) -> None:
        with self._lock:
            self._known[digest] = reason
            while len(self._known) > _KNOWN:
                self._known.popitem(last=False)


def _too_much(reason: str) -> InvalidGrammarError:
    return InvalidGrammarError(
        f"the grammar cannot be compiled: {reason}",
        remedy="Simplify it: bound its repetitions and its alternatives.",
    )
