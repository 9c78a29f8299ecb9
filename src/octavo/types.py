"""Values that cross layers: what goes into the engine, what comes out, and what a model is read from.

Frozen dataclasses and protocols only; nothing here imports anything of ours. Shape letters are those of
docs/architecture.md: T tokens, N output rows, K input columns, V vocabulary.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NotRequired, Protocol, TypedDict

if TYPE_CHECKING:
    import numpy as np

# --- what a model is read from -------------------------------------------------------------------


class TensorRef(Protocol):
    """A tensor of a checkpoint that has not been read yet. Everything but `read` comes from the header."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str:
        """Storage type as the file names it, lower case: f32 f16 bf16 i8 u8 ... or q8_0 q4_1 ... (GGUF)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape in row-major order, output rows first: [N, K] for a matrix, also for GGUF."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""

    def read(self) -> np.ndarray:
        """The raw stored values, read-only.

        f32, f16 and integer types come as numpy arrays of `shape`; bf16 as uint16 bit patterns of
        `shape`; block-quantized GGUF types as uint8 of [N, bytes a row].
        """


TokenizerKind = Literal["tokenizer.json", "sentencepiece", "tekken", "gguf"]


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """Where the tokenizer comes from.

    `kind` "tokenizer.json": `data` is that file's bytes; "sentencepiece": tokenizer.model's; "tekken":
    tekken.json's. "gguf": `metadata` holds the `tokenizer.ggml.*` entries. `config` is tokenizer_config.json
    merged over special_tokens_map.json (empty for GGUF).
    """

    kind: TokenizerKind
    data: bytes = b""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


TensorNaming = Literal["huggingface", "gguf"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model as found on disk: everything needed to plan it, and lazy references to its weights.

    `config` has the keys of Hugging Face's config.json (translated from metadata for GGUF).
    `fingerprint` is a SHA-256 hex digest that changes when any weight, config or tokenizer byte may have.
    """

    location: str
    """What the user would call it: a path, or "org/name"."""
    revision: str | None
    """The pinned commit of a hub repository, else None."""
    naming: TensorNaming
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    tokenizer: TokenizerSource | None
    """None for a folder without a tokenizer: token ids still work."""
    chat_template: str | None
    tensors: Mapping[str, TensorRef]
    fingerprint: str
    quantized_as: tuple[str, ...] = ()
    """Block-quantized types of the weights (q4_1, ...), the one with most bytes first; () in full precision."""
    notices: tuple[str, ...] = ()
    """What the user should know of how the model was found, e.g. that the hub could not be reached."""


class Progress(Protocol):
    """Called as long work advances; `total_bytes` is None where it is not known."""

    def __call__(self, stage: str, done_bytes: int, total_bytes: int | None) -> None:
        """`stage` is a short verb phrase a person reads: "downloading", "packing int8", "loading"."""


LoadState = Literal["initializing", "loading", "warming", "ready", "draining", "closed"]
"""initializing: finding and planning; loading: weights; warming: building the runner, compiling; draining: closing,
while requests end."""


# --- what goes into the engine ---------------------------------------------------------------------


class FunctionCall(TypedDict):
    name: str
    arguments: str
    """A JSON object, as text."""


class ToolCall(TypedDict):
    """A call that the assistant made, in OpenAI's form."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(TypedDict):
    """One turn of a chat, in OpenAI's form."""

    role: str
    content: str
    reasoning_content: NotRequired[str]
    """Of an assistant that thought before it answered; most templates leave it out of earlier turns."""
    tool_calls: NotRequired[Sequence[ToolCall]]
    """Of an assistant; its content may then be empty."""
    tool_call_id: NotRequired[str]
    """Of a tool's answer: which call it answers."""
    name: NotRequired[str]
    """Of a tool's answer: which tool gave it."""


Tool = Mapping[str, Any]
"""The definition of a tool, in OpenAI's form: {"type": "function", "function": {"name": ..., "parameters": schema}}."""

ToolChoice = Literal["none", "auto", "required"] | Mapping[str, Any]
"""Whether tools may or must be called, or the one to call: {"type": "function", "function": {"name": ...}}."""

TemplateOptions = Mapping[str, str | bool]
"""Variables that a model's own template offers, such as enable_thinking."""


GREEDY_BELOW = 1e-5
"""A temperature below this is greedy: fp32 logits do not resolve a smaller one."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sampling law's parameters, resolved: no None, every range checked by `octavo.validate`.

    The law is docs/sampling.md. A value that switches a step off is its default.
    """

    temperature: float = 1.0
    """0 is greedy: argmax after penalties, bias and mask; lowest id on ties."""
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Hugging Face's: over prompt and generated tokens."""
    presence_penalty: float = 0.0
    """OpenAI's: over generated tokens."""
    frequency_penalty: float = 0.0
    """OpenAI's: over generated tokens."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, added to its logit), sorted by id, ids unique."""
    seed: int = 0
    """0 <= seed < 2**64. Drawn before the request reaches the engine where the user gave none, and returned."""
    choice: int = 0
    """Which of n choices of the same prompt this is; part of the noise's key."""
    logprobs: int | None = None
    """None: no logprobs. n >= 0: the sampled token's, and the n most probable tokens'."""


GrammarKind = Literal["json_schema", "regex", "lark", "tool_calls", "anything"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the generated text has to match from its first character to its last."""

    kind: GrammarKind
    text: str
    """The schema as JSON text, the regular expression (anchored at both ends), or the Lark grammar; of "tool_calls"
    a Lark grammar that `octavo.text.tool_grammar` made, which may name control tokens as no caller's may. "anything"
    has none: there is only `reasoning_tokens` to hold."""
    after_reasoning: Literal["no", "maybe", "yes"] = "no"
    """Whether reasoning comes first, up to its closing marker, and only what follows has to match: a block that the
    text may open ("maybe"), or that the prompt has opened ("yes")."""
    reasoning_tokens: int | None = None
    """Most tokens of that block: its closing marker is then written for the model."""


LogitsProcessor = Callable[[Sequence[int], "np.ndarray"], "np.ndarray"]
"""(prompt and generated token ids, fp32 [V] logits) -> fp32 [V] logits to sample from."""


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate. Every id is below the vocabulary's size (checked by `octavo.validate`)."""

    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    max_new_tokens: int
    """0 with `prompt_logprobs`: score only."""
    stop_token_ids: frozenset[int] = frozenset()
    prompt_logprobs: int | None = None
    """None: none. n >= 0: for each prompt token but the first, its logprob and the n most probable ones."""
    salt: str = ""
    """Separates prefix reuse between users; part of the prefix key."""
    adapter: str | None = None
    priority: int = 0
    """Higher goes first; within one, first come first served."""
    grammar: Grammar | None = None
    logits_processors: tuple[LogitsProcessor, ...] = ()
    """Applied in order before the law's first step; they cost a copy of the logits a token."""


# --- what comes out of it ----------------------------------------------------------------------------


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CONTENT_FILTER = "content_filter"
    """An output filter of the user's ended it."""
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithms of the softmax of the unmodified fp32 logits."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob), best first, ties by lowest id."""


@dataclass(slots=True)
class TokenEvent:
    """One step of one request: a token, or its end, or both.

    Nobody writes to one, but it is not frozen: one is made for every token, and freezing costs a microsecond.

    A stop token is emitted (it was generated and is counted) together with finish_reason STOP; the text
    layer leaves it out. The last event of a request, and only that, carries `finish_reason`.
    """

    request_id: int
    token_id: int | None = None
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """On the first event of a request that asked for them: prompt tokens 1..T-1."""
    cached_tokens: int = 0
    """Prompt tokens whose KV was reused; on the first event."""
    queued_seconds: float = 0.0
    """Wall-clock time from submit to admission; on the first event."""


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """Wall-clock seconds of one request; rates are None where nothing was timed."""

    queued_seconds: float
    first_token_seconds: float | None
    """From submit to the first token."""
    total_seconds: float
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None
    """Tokens after the first, over the time between the first and the last."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What `LLM.generate` and `LLM.chat` return for one prompt: the first of its choices."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_token_ids: tuple[int, ...]
    usage: Usage
    timings: Timings
    seed: int
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """Of prompt tokens 1..T-1; with the first choice only."""
    notices: tuple[str, ...] = ()
    """What was done to the messages of a chat that the user should know."""
    choice: int = 0
    reasoning: str = ""
    """Of a chat with tools: what the model thought before it answered, which its `text` then leaves out."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Of a chat with tools: the calls, which its `text` leaves out. The last one's arguments are cut short where the
    finish reason is not STOP."""
    others: tuple[Completion, ...] = ()
    """The choices after the first, where n > 1 were asked for. They share its seed and differ in `choice`."""

    @property
    def choices(self) -> tuple[Completion, ...]:
        """All of them, this one first."""
        return (self, *self.others)


@dataclass(frozen=True, slots=True)
class TextEvent:
    """What `LLM.stream` yields: the new text of a choice since its last event. Joined, they are `Completion.text`."""

    text: str
    token_ids: tuple[int, ...]
    """Tokens this text came from; empty when only held-back text is released."""
    finish_reason: FinishReason | None = None
    completion: Completion | None = None
    """On a choice's last event; its `others` are empty."""
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Score:
    """What `LLM.score` returns: log p(token i+1 | tokens <= i), fp32, natural logarithm."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Length T-1."""
    perplexity: float
    """exp(-mean(logprobs))."""
