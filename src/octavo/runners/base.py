"""The Runner contract: what the engine asks of a device, and the values they exchange.

A runner owns device memory, the paged KV cache and the slots. The engine decides (which sequence, which
pages, which slot), the runner computes. `forward` and `sample` queue work and return handles, so the host
can read token n while forward n+1 runs. Shape letters: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from octavo.models.parameters import Parameter
from octavo.models.spec import ModelSpec
from octavo.quant.format import Format, Layout
from octavo.types import Sampling, TokenLogprob

if TYPE_CHECKING:
    import numpy as np

    from octavo.weights import WeightStore

ResultT = TypeVar("ResultT", covariant=True)


class Handle(Protocol[ResultT]):
    """Work that was queued on a device."""

    def done(self) -> bool:
        """True once `result` would not wait."""

    def result(self) -> ResultT:
        """Wait for the work and return it; raises what it raised. May be called again."""


@dataclass(frozen=True, slots=True)
class Done(Generic[ResultT]):
    """A handle of work that is already finished."""

    value: ResultT

    def done(self) -> bool:
        return True

    def result(self) -> ResultT:
        return self.value


@dataclass(frozen=True, slots=True)
class SlotState:
    """All a runner needs to go on with a sequence from scratch: the engine opens and rebuilds slots with it."""

    token_ids: Sequence[int]
    """Prompt and generated tokens so far; the last one is what a decode step feeds."""
    prompt_tokens: int
    """How many of `token_ids` are the prompt (penalties count the rest apart)."""
    sampling: Sampling
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter: low-rank addends of linears, y += (x a^T) b^T before the linear's epilogue."""

    digest: str
    """SHA-256 of its content: part of the prefix key."""
    addends: Mapping[str, tuple[np.ndarray, np.ndarray]]
    """Parameter name -> (a fp32 [R, K], b fp32 [N, R]); b already contains the scale alpha / R."""


@dataclass(slots=True)
class Chunk:
    """Consecutive tokens of one sequence in one forward pass.

    Nobody writes to one, but it is not frozen: one is made for every token, and freezing costs a microsecond.
    """

    slot: int
    start: int
    """Position of the first token; keys and values before it are already in the pages."""
    token_ids: tuple[int, ...] | None
    """A prefill chunk's ids; None: the one token last sampled in this slot, which may still be on the device."""
    page_tables: tuple[tuple[int, ...], ...]
    """For each KV group, the page of tokens [32 i, 32 i + 32); -1 where the group no longer needs it."""
    sample: bool
    """Keep the logits of the last row, and of the `drafts` rows before it, for `sample`."""
    drafts: int = 0
    """How many of the last `token_ids` are guesses at tokens that sampling has yet to give (speculation)."""
    targets: tuple[int, ...] | None = None
    """Prompt logprobs: for each row the id whose logprob is wanted, i.e. the next prompt token; -1 for none."""
    top_logprobs: int = 0
    """How many most probable tokens to return beside each target."""

    @property
    def tokens(self) -> int:
        return 1 if self.token_ids is None else len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Batch:
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """One entry a chunk."""

    prompt_logprobs: tuple[tuple[TokenLogprob, ...] | None, ...]
    """None where the chunk had no targets; rows with target -1 are left out."""


@dataclass(frozen=True, slots=True)
class Sampled:
    token_id: int
    """-1 where the row's logits were not finite: the request fails, its neighbours do not."""
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class SampleResult:
    """One entry for each chunk of the batch with `sample` set, in order."""

    tokens: tuple[tuple[Sampled, ...], ...]
    """One token; of a chunk with drafts up to `drafts` more: sampling goes on while it gives what was guessed."""


@dataclass(frozen=True, slots=True)
class RunnerInfo:
    """What a runner is and guarantees; shown by `explain` and `info()`."""

    name: str
    device: str
    layout: str
    """Packed layout id, part of the cache key: ref-1, cpu-r8-1, cuda-b64-1, ..."""
    compute_dtype: str
    kv_dtype: str
    max_slots: int
    kv_pages: tuple[int, ...]
    """Pages in each KV group, in the order of `ModelSpec.kv_groups`."""
    kernels: Mapping[str, str]
    """What computes each part, for `explain`: "int8 linears" -> "AVX2, int16 activations", ..."""
    batch_invariant: bool
    """Tokens and logprobs of a sequence are bit-equal alone and in any batch."""
    chunk_invariant: bool
    """... and however its prompt is cut into chunks, or found in the prefix cache."""
    takes_drafts: bool = True
    """Whether chunks may have drafts, where results are chunk_invariant."""

    @property
    def may_speculate(self) -> bool:
        """Whether guesses can be verified without changing what is generated."""
        return self.chunk_invariant and self.takes_drafts


@dataclass(frozen=True, slots=True)
class Counters:
    """Since load. A compiled step after warm-up changes none of `captures`, `recompiles`, `eager_steps`."""

    graphs: int = 0
    captures: int = 0
    recompiles: int = 0
    eager_steps: int = 0


class Runner(Protocol):
    """Not thread-safe: one engine thread calls it.

    Pages, slots and adapters may be reused only after the last step queued on them is done. A fault in one
    chunk must not change another chunk's results.
    """

    @property
    def info(self) -> RunnerInfo: ...

    def open_slot(self, slot: int, state: SlotState) -> None:
        """Bind a sequence to a free slot, or rebuild its state (after preemption)."""

    def close_slot(self, slot: int) -> None: ...

    def forward(self, batch: Batch) -> Handle[ForwardResult]:
        """Queue the model for every chunk; writes their keys and values into their pages."""

    def logits(self, slot: int) -> np.ndarray:
        """A copy of the fp32 [V] logits that `sample` would read for a chunk without drafts; waits for them."""

    def sample(
        self,
        batch: Batch,
        masks: Mapping[int, np.ndarray] | None = None,
        logits: Mapping[int, np.ndarray] | None = None,
    ) -> Handle[SampleResult]:
        """Queue sampling for the chunks of the batch just forwarded that have `sample` set.

        The sampled token becomes the slot's last token. `masks`: slot -> uint32 [ceil(V / 32)], bit i % 32
        of word i // 32 set where token i is allowed. `logits`: slot -> fp32 [V] to sample from instead of the
        model's (logprobs stay the model's). Neither goes with drafts.

        A chunk with drafts is sampled row by row, each with the token before it as the slot's last: row j's
        token is kept, and where it differs from guess j the rows after it are left alone. Keys and values of
        refuted guesses stay in the pages until the positions are fed again.
        """

    def load_adapter(self, name: str, adapter: Adapter) -> None:
        """Make an adapter available to slots opened with its name. Raises IncompatibleModelError where it does
        not fit the model."""

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter that no open slot uses."""

    def memory(self) -> Mapping[str, int]:
        """Bytes held now, by part: weights, kv, activations, ..."""

    def counters(self) -> Counters: ...

    def close(self) -> None:
        """Give all memory back. Idempotent."""


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """What a `LoadPlan` settles about a runner before it is built."""

    device: str
    """cpu, cuda:N or mps."""
    compute_dtype: str
    """float32, bfloat16 or float16."""
    kv_dtype: str
    context_tokens: int
    max_slots: int
    kv_pages: tuple[int, ...]
    """Pages in each KV group, in the order of `ModelSpec.kv_groups`."""
    prefill_chunk_tokens: int
    """Most tokens of one chunk: bounds activations, and the pages a window group needs."""
    threads: int | None = None
    draft_rows: int = 0
    """Most guesses verified in a step, where the runner's results allow guessing."""
    deterministic: bool = False
    """Results must be batch_invariant and chunk_invariant; a runner that cannot declines."""


class RunnerKind(Protocol):
    """A runner that could be chosen: cheap to ask, imports its heavy libraries only in `create`."""

    @property
    def name(self) -> str: ...

    @property
    def layout(self) -> Layout: ...

    def declines(self, spec: ModelSpec, formats: Sequence[Format], config: RunnerConfig) -> str | None:
        """Why this runner cannot take this model, in words for the user; None: it can."""

    def weight_bytes(self, parameter: Parameter, format: Format, config: RunnerConfig) -> int:
        """Bytes this runner holds for one parameter once loaded, beside the packed cache's mapped pages."""

    def process_bytes(self, config: RunnerConfig) -> int:
        """A process that has loaded what this runner imports, and no model: its memory and its libraries' pages."""

    def activation_bytes(self, spec: ModelSpec, config: RunnerConfig) -> int:
        """Most bytes of activations, logits and workspaces in a step."""

    def preload(self, config: RunnerConfig) -> None:
        """Begin in the background what `create` needs beside the weights: imports, a device's context. Returns at
        once, and never raises: `create` finds out."""

    def create(self, spec: ModelSpec, weights: WeightStore, config: RunnerConfig) -> Runner: ...
