"""Which token ids end a generation: what the configs say, what the tokenizer says, and the end of a turn.

Checkpoints disagree with themselves (a base model's eos in config.json, the chat model's in
generation_config.json, a third in the template), and an end that is missed makes a model talk to itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from octavo.errors import ModelFormatError

if TYPE_CHECKING:
    from octavo.text.chat import ChatTemplate
    from octavo.text.tokenizer import Tokenizer

END_OF_TURN_TOKENS = frozenset(
    {
        "<|im_end|>",  # ChatML
        "<|eot_id|>",  # Llama 3
        "<|eom_id|>",
        "<|eot|>",  # Llama 4
        "<|end|>",  # Phi 3
        "<|return|>",  # Harmony
        "<|call|>",
        "<end_of_turn>",  # Gemma
        "<turn|>",
        "<|endoftext|>",  # GPT-2
        "<|end_of_text|>",  # Llama 3, Granite
        "<|END_OF_TURN_TOKEN|>",  # Command R
        "<end_of_utterance>",  # SmolVLM
        "<｜end▁of▁sentence｜>",  # DeepSeek
        "<|EOT|>",
        "<EOT>",
        "[EOT]",
        "[EOS]",
    }
)
"""Spellings that mean the end of a turn wherever they are control tokens (as llama.cpp's list)."""


def stop_token_ids(
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    chat_template: ChatTemplate | None = None,
) -> frozenset[int]:
    """Every id that ends a generation: `eos_token_id` of both configs (a number or a list; of `text_config`
    too), the tokenizer's own, known ends of turn in its vocabulary, and what the template writes after an
    assistant's message. Without a tokenizer (a folder that has none), what the configs say.

    Raises ModelFormatError where an `eos_token_id` is neither.
    """
    text_config = config.get("text_config")
    stated: set[int] = set()
    for section in (config, text_config if isinstance(text_config, Mapping) else {}, generation_config):
        stated |= _ids(section.get("eos_token_id"))
    if tokenizer is None:
        return frozenset(stated)
    stated |= tokenizer.end_token_ids
    found = {
        token_id
        for spelling in END_OF_TURN_TOKENS
        if (token_id := tokenizer.token_id(spelling)) in tokenizer.special_token_ids and token_id is not None
    }
    if chat_template is not None:
        found |= chat_template.end_of_turn_token_ids()
    # Harmony's <|end|> closes a channel; the turn goes on until <|return|> or <|call|>.
    if {tokenizer.token_id("<|return|>"), tokenizer.token_id("<|call|>")} <= found:
        found -= {tokenizer.token_id("<|end|>")}
    return frozenset(stated | found)


def _ids(value: Any) -> set[int]:
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in values):
        raise ModelFormatError(
            f"the model's eos_token_id is {value!r:.100}, neither a token id nor a list of them",
            remedy="Correct config.json or generation_config.json, or fetch the model again.",
        )
    return {item for item in values if item >= 0}  # -1 stands for none in some configs
