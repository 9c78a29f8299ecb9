"""Grammars: which tokens may come next, so that a text matches a JSON schema, a regular expression or Lark rules.

llguidance parses; here it gets this model's token bytes, its words become ours, and what it would ignore is
refused. A control token is never allowed but for the model's own stop tokens, and those only where the grammar
may end, and for the markers of reasoning and of tool calls where a grammar of ours puts them. Sizes are
`octavo.validate`'s business. Shape letter: V vocabulary, the width of the logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any

from octavo.errors import InvalidGrammarError
from octavo.text.answer import REASONING_BEGIN, REASONING_END
from octavo.text.grammar_errors import explain, explain_schema, refuse_unkept
from octavo.text.reasoning_budget import ReasoningBudget
from octavo.text.tokenizer import Tokenizer
from octavo.types import Grammar

if TYPE_CHECKING:
    import llguidance
    import numpy as np

_KEPT_GRAMMARS = 64
"""Compiled grammars kept: requests tend to repeat them, and a copy costs microseconds."""

_WHITESPACE = r"[ \t\n\r]{1,64}"
"""Between the tokens of JSON. JSON itself has no bound, and small models fall into endless whitespace."""

SCHEMA_OPTIONS = {"whitespace_pattern": _WHITESPACE, "lenient": False, "coerce_one_of": False}
"""How JSON is written that a schema of a tool's arguments asks for."""

_FINISHED = ("NotStopped", "NoExtension", "NoExtensionBias", "EndOfSentence")
"""Reasons of a parser that stopped because the text is complete, or not at all; others are limits it hit."""


class Grammars:
    """Compiles grammars for one tokenizer. Thread-safe.

    `vocab_size` is V; `end_token_ids` are the model's stop tokens, which end a text that matches.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, end_token_ids: Iterable[int]) -> None:
        self._text = tokenizer
        self._vocab_size = vocab_size
        self._ends = tuple(sorted(end_token_ids))

    def read_vocabulary(self) -> None:
        """Now rather than for the first grammar. Raises InvalidGrammarError for a model without an end."""
        _ = self._compiled

    def check(self, grammar: Grammar) -> None:
        """Raises InvalidGrammarError where it does not compile or says what cannot be kept."""
        if grammar.kind != "anything":
            self._compiled(replace(grammar, reasoning_tokens=None))

    def constraint(self, grammar: Grammar) -> GrammarConstraint | ReasoningBudget:
        """A fresh parser at the start of a text. Raises InvalidGrammarError."""
        parser = None
        if grammar.kind != "anything":
            unlimited = replace(grammar, reasoning_tokens=None)  # one parser for all budgets
            parser = GrammarConstraint(self._compiled(unlimited).deep_copy(), self._vocab_size)
            if grammar.reasoning_tokens is None:
                return parser
        return ReasoningBudget(
            parser,
            tokens=grammar.reasoning_tokens or 0,
            opened=grammar.after_reasoning == "yes",
            closing=self._closing,
            spell=self._spell,
            vocab_size=self._vocab_size,
        )

    @cached_property
    def _closing(self) -> tuple[int, ...]:
        """The closing marker on a line of its own and a blank line, as the families that think write it."""
        marker = self._text.added_tokens.get(REASONING_END)
        if marker is None:
            return tuple(self._text.encode_plain(f"\n{REASONING_END}\n\n", at_start=False))
        before, after = (self._text.encode_plain(text, at_start=False) for text in ("\n", "\n\n"))
        return (*before, marker, *after)

    def _spell(self, token_id: int) -> bytes:
        return self._text.token_bytes(token_id, first=False, keep_special=True) or b""

    @cached_property
    def _compiled(self) -> Callable[[Grammar], llguidance.LLMatcher]:
        """Reads the whole vocabulary once, a quarter of a second for 49,152 tokens, when first asked."""
        if not self._ends:
            raise InvalidGrammarError(
                "the model has no stop token, so a text that matches a grammar could never end",
                remedy="Name eos_token_id in the model's config.json, or leave the grammar out.",
            )
        import llguidance

        words = llguidance.TokenizerWrapper(_Words(self._text, self._vocab_size, self._ends[0]))
        tokenizer = llguidance.LLTokenizer(words, eos_token=list(self._ends))
        marks = {
            spelling: self._text.added_tokens[spelling]
            for spelling in (REASONING_BEGIN, REASONING_END)
            if self._text.added_tokens.get(spelling) in self._text.reserved_token_ids
        }
        return lru_cache(maxsize=_KEPT_GRAMMARS)(partial(_compile, tokenizer, marks))


class GrammarConstraint:
    """One text on its way through a grammar. Not thread-safe."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        import numpy as np

        self._matcher = matcher
        self._mask = np.zeros((vocab_size + 31) // 32, np.uint32)

    def mask(self) -> np.ndarray:
        """uint32 [ceil(V / 32)]: bit i % 32 of word i // 32 is set where token i may come next.

        The same array each time, good until the next call. Raises InvalidGrammarError where the parser gave up.
        """
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._require_sound()
        return self._mask

    def accept(self, token_id: int) -> None:
        """The text goes on with an allowed token. Raises InvalidGrammarError for another one."""
        self._matcher.consume_token(token_id)
        self._require_sound()

    @property
    def complete(self) -> bool:
        """Whether the text so far matches the whole grammar; it may go on all the same."""
        return self._matcher.is_accepting()

    @property
    def finished(self) -> bool:
        """Whether it matches and nothing may follow."""
        return self._matcher.is_stopped() and self._matcher.is_accepting()

    def _require_sound(self) -> None:
        reason = self._matcher.stop_reason()
        if self._matcher.is_error() or reason not in _FINISHED:
            said = self._matcher.get_error().partition("\n")[0] or reason
            raise InvalidGrammarError(
                f"the grammar could not be followed any further: {said}",
                remedy="Simplify the grammar: bound its repetitions and its alternatives.",
            )


class _Words:
    """What llguidance asks of a tokenizer.

    Tokens without bytes are never allowed: control tokens, rows without a token, and what stands for unknown
    characters.
    """

    special_token_ids: tuple[int, ...] = ()
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_id
        nothing = {*tokenizer.reserved_token_ids, tokenizer.unknown_token_id}
        known = range(min(vocab_size, tokenizer.vocab_size))
        spelled = [
            b"" if token in nothing else tokenizer.token_bytes(token, first=False) or b"" for token in known
        ]
        self.tokens = [*spelled, *[b""] * (vocab_size - len(spelled))]
        self._ids = {data: token for token, data in reversed(list(enumerate(spelled))) if data}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str) -> list[int]:
        """Tokens that are exactly these bytes, the model's own cut if it is one of them: a SentencePiece encoder
        puts a space in front."""
        if not isinstance(text, str):
            raise TypeError("text, not bytes")  # so it learns to ask with text
        ids, data = self._tokenizer.encode_plain(text, at_start=False), text.encode()
        return ids if b"".join(self.tokens[token] for token in ids) == data else self._greedy(data)

    def _greedy(self, data: bytes) -> list[int]:
        """The longest token that fits, again and again; nothing where some byte has none."""
        ids, start = [], 0
        while start < len(data):
            ends = range(min(len(data), start + self._longest), start, -1)
            found = next((self._ids[data[start:end]] for end in ends if data[start:end] in self._ids), None)
            if found is None:
                return []
            ids.append(found)
            start += len(self.tokens[found])
        return ids


def _compile(
    tokenizer: llguidance.LLTokenizer, marks: Mapping[str, int], grammar: Grammar
) -> llguidance.LLMatcher:
    from llguidance import LLMatcher, LLParserLimits, regex_to_lark

    def matcher(text: str) -> llguidance.LLMatcher:
        return LLMatcher(tokenizer, text, log_level=0, limits=LLParserLimits(verbose_errors=False))

    match grammar.kind:
        case "json_schema":
            text = _from_schema(grammar.text)
        case "regex":
            # Classes such as \d are ASCII's: who asks for digits wants 0 to 9.
            text = LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(grammar.text, 'dws')}/")
        case "lark":
            refuse_unkept(grammar.text)
            text = LLMatcher.grammar_from_lark(grammar.text)
        case "tool_calls" | "anything":
            text = LLMatcher.grammar_from_lark(grammar.text)
    made = matcher(text)
    if said := _error(made):
        if grammar.kind == "json_schema":
            raise explain_schema(grammar.text, said, lambda text: _error(matcher(_from_schema(text))))
        raise explain(grammar, said)
    if grammar.after_reasoning != "no":
        content = json.loads(text)["grammars"][0] if grammar.kind == "json_schema" else {"lark_grammar": text}
        made = matcher(_after_reasoning(content, marks, opened=grammar.after_reasoning == "yes"))
        if said := _error(made):
            raise explain(grammar, said)
    return made


def _after_reasoning(content: Mapping[str, Any], marks: Mapping[str, int], *, opened: bool) -> str:
    """A grammar behind a block of reasoning. `marks`: the block's markers that are control tokens."""
    if REASONING_END in marks:
        end, thoughts = f"thoughts? <[{marks[REASONING_END]}]>", "thoughts: /(?s:.+)/"
    else:
        end, thoughts = "thoughts", f"thoughts[lazy]: /(?s:.*)<\\/{REASONING_END.removeprefix('</')}/"
    begin = f"<[{marks[REASONING_BEGIN]}]>" if REASONING_BEGIN in marks else json.dumps(REASONING_BEGIN)
    block = f"{end} SPACE?" if opened else f"({begin} {end} SPACE?)?"
    rules = f"start: {block} content\n{thoughts}\nSPACE: /[ \\t\\r\\n]{{1,8}}/\ncontent: @content\n"
    return json.dumps(
        {"grammars": [{"name": "answer", "lark_grammar": rules}, {**content, "name": "content"}]}
    )


def _from_schema(text: str) -> str:
    from llguidance import LLMatcher

    try:
        return LLMatcher.grammar_from_json_schema(
            text,
            defaults={"whitespace_pattern": _WHITESPACE},
            overrides={"lenient": False, "coerce_one_of": False},
        )
    except ValueError as error:
        raise InvalidGrammarError(
            "the JSON schema is not a JSON object", remedy='Give an object such as {"type": "object"}.'
        ) from error


def _error(matcher: llguidance.LLMatcher) -> str:
    """A warning, of what would be ignored, counts as one."""
    return matcher.get_error() or "; ".join(matcher.get_grammar_warnings())
