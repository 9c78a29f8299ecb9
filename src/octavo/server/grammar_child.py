"""The child that compiles grammars for one vocabulary: `python -m octavo.server.grammar_child LINK`.

`octavo.server.grammar_checker` is what asks it.
"""

from __future__ import annotations

import sys
from typing import Any

from octavo.server import wire
from octavo.server.child import Answer, QuestionCaps, serve
from octavo.text.grammar import Grammars
from octavo.text.tokenizer import load_tokenizer

CAPS = QuestionCaps(memory_bytes=512 << 20, cpu_seconds=1.5)


def _set_up(first: Any) -> Answer:
    if not isinstance(first, wire.Vocabulary):
        raise wire.WireError("the first message is the vocabulary")
    tokenizer = load_tokenizer(first.tokenizer, model_vocab_size=first.vocab_size)
    grammars = Grammars(tokenizer, vocab_size=first.vocab_size, end_token_ids=first.end_token_ids)
    grammars.read_vocabulary()

    def answer(question: Any) -> wire.FromChild:
        if not isinstance(question, wire.Check):
            raise wire.WireError(f"not a question here: {type(question).__name__}")
        # The first mask too: what is compiled is compiled as far as it is needed.
        grammars.constraint(question.grammar).mask()
        return wire.Done()

    return answer


if __name__ == "__main__":
    serve(sys.argv[1], CAPS, _set_up)
