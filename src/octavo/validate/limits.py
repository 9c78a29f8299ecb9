"""How much one call may ask for. A server makes its own, tighter `Limits`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much one call may ask for. The defaults are safe for a process that serves its own user."""

    prompts: int = 65_536
    text_bytes: int = 16 << 20
    """UTF-8 bytes of a prompt, or of all messages of a chat."""
    messages: int = 4096
    stop_strings: int = 16
    stop_characters: int = 256
    """In one stop string: this much text may have to be held back while streaming."""
    stop_token_ids: int = 256
    logit_bias: int = 1024
    logprobs: int = 20
    choices: int = 128
    """n: answers to one prompt."""
    grammar_bytes: int = 64 << 10
    """UTF-8 bytes of a JSON schema, a regular expression or a Lark grammar."""
    schema_depth: int = 32
    """Objects and arrays inside each other in a JSON schema."""
    logits_processors: int = 16
    tools: int = 128
    tool_bytes: int = 256 << 10
    """UTF-8 bytes of all definitions of tools as JSON, and of the arguments of one call."""


DEFAULT_LIMITS = Limits()
