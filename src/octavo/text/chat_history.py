"""Shortens a chat until its prompt fits: the oldest turns go first, and the caller learns which.

A turn is a user message with the answers to it. System messages at the start stay, and so does the last turn.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from octavo.errors import ContextLengthError
from octavo.types import Message


@dataclass(frozen=True, slots=True)
class TrimmedHistory:
    messages: tuple[Message, ...]
    """What is kept: its prompt fits."""
    dropped: tuple[Message, ...]
    """What is not, oldest first; () if everything fitted."""


def trim_history(
    messages: Sequence[Message], budget_tokens: int, count_tokens: Callable[[Sequence[Message]], int]
) -> TrimmedHistory:
    """Drop as few of the oldest turns as makes the prompt at most `budget_tokens` long.

    `count_tokens`: the length of the prompt that `ChatTemplate.render` makes of messages; it is called about
    log2(turns) times. Raises ContextLengthError where the last turn alone is too long, and whatever
    `count_tokens` raises.
    """
    system = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    later_turns = [i for i in range(system + 1, len(messages)) if messages[i]["role"] == "user"]
    cuts = [system, *later_turns]
    lengths: dict[int, int] = {}

    def kept(number: int) -> tuple[Message, ...]:
        return (*messages[:system], *messages[cuts[number] :])

    def fits(number: int) -> bool:
        lengths[number] = count_tokens(kept(number))
        return lengths[number] <= budget_tokens

    # Prompts get shorter with every turn dropped, so whether they fit can be bisected.
    number = 0 if fits(0) else bisect_left(range(len(cuts)), True, lo=1, key=fits)
    if number == len(cuts):
        needed = lengths[number - 1]
        raise ContextLengthError(
            f"the last message needs {needed} tokens with its prompt; {budget_tokens} fit",
            remedy="Shorten the message, or load the model with a larger --context.",
            prompt_tokens=needed,
            context_tokens=budget_tokens,
        )
    return TrimmedHistory(kept(number), tuple(messages[system : cuts[number]]))
