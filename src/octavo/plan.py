"""Plan before load: from headers alone, what will run where, and how many bytes each part takes.

Pure functions of facts others gathered (`octavo.devices`, `octavo.sources`, `octavo.weights.choose_formats`):
nothing is read, allocated or imported here, and a load that cannot fit is refused with what to change. What
comes of it is an `octavo.load_plan.LoadPlan`; the words in it are `octavo.plan_words`'.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from octavo.devices import DeviceChoice, Machine, Unusable
from octavo.dtypes import DtypePolicy, kv_vector_bytes, resolve_dtypes
from octavo.engine.page_pool import pages_for_sequence, pages_for_tokens
from octavo.engine.scheduler import MAX_DRAFT_ROWS
from octavo.errors import DeviceError, IncompatibleModelError, InvalidParameterError, OctavoError
from octavo.load_plan import Context, Declined, KVMemory, LoadPlan, Pool, StoredWeights
from octavo.models.parameters import Parameter
from octavo.models.spec import KV_PAGE_TOKENS, KVGroup, ModelSpec
from octavo.nvml import CardProcess
from octavo.plan_words import (
    context_reason,
    device_reason,
    refusal,
    rope_reasons,
    runner_reason,
    sequences_reason,
    tight_warning,
    weights_reason,
)
from octavo.quant.format import Format
from octavo.runners.base import RunnerConfig, RunnerKind
from octavo.settings import DEFAULT_CONTEXT_TOKENS, Settings

LEAST_DEFAULT_CONTEXT_TOKENS = 512
"""A default context that would have to be smaller is refused: so little is only right when asked for."""

PREFILL_CHUNK_TOKENS = 512
"""Most prompt tokens in one forward pass: long enough to keep matrix units busy, short enough to bound
activations."""

VOCABULARY_ENTRY_BYTES = 640
"""A loaded tokenizer, for each vocabulary entry: 0.61 KiB measured for a byte-level BPE of 49,152 and our tables."""

GRAMMAR_LIBRARY_BYTES = 5 << 20
"""llguidance's pages, which the first grammar brings in."""

GRAMMAR_ENTRY_BYTES = 640
"""What it keeps of each vocabulary entry: 335 to 690 bytes measured, over vocabularies of 32,000 to 256,000."""

DEFAULT_SEQUENCES = 8
"""Sequences generated together where no number is asked for. They share the KV memory of one full context, so
that they cost next to nothing: who needs it all runs alone, and short ones run together."""

RESERVE_SHARE = 0.05
"""Share of the available memory a plan leaves alone: allocators round up, and others allocate too."""


def make_plan(
    *,
    settings: Settings,
    spec: ModelSpec,
    parameters: Sequence[Parameter],
    formats: Mapping[str, Format],
    file_bytes: Mapping[str, int],
    kinds: Sequence[RunnerKind],
    machine: Machine,
    device: DeviceChoice,
    alternatives: Mapping[str, Mapping[str, Format]] | None = None,
) -> LoadPlan:
    """Decide everything about a load, or refuse it.

    `settings` are valid (`octavo.validate`). `formats` has an entry for every parameter, `file_bytes` for every
    source tensor. `kinds` are tried in order, the reference last. `alternatives` are the formats that other
    --quant values would give; they are tried only to say, in a refusal, which of them would fit.

    Raises InvalidParameterError for threads beyond the CPUs, a context beyond the model's or contradicting dtypes,
    IncompatibleModelError where every runner declines, DeviceError for the CUDA runner where there is no CUDA,
    NotEnoughMemoryError with needed and usable bytes.
    """
    asked, most = settings.context, spec.max_context_tokens
    if asked is not None and asked > most:
        raise InvalidParameterError(
            f"--context {asked} is more than the {most} tokens this model was made for",
            remedy=f"Use --context {most} or less.",
            parameter="context",
        )
    if settings.threads is not None and settings.threads > machine.cpus:
        raise InvalidParameterError(
            f"--threads {settings.threads} is more than the {machine.cpus} CPUs this process may use",
            remedy=f"Use --threads {machine.cores}, its physical cores, or leave it out.",
            parameter="threads",
        )
    facts = _Facts(spec, parameters, kinds, machine, device)
    load, declined = facts.choose_runner(settings, formats)
    fits = load.largest_context()
    least = asked if asked is not None else min(LEAST_DEFAULT_CONTEXT_TOKENS, most)
    if not load.fits(least):
        others = {f"--quant {name}": (settings, other) for name, other in (alternatives or {}).items()}
        if load.sequences > 1:
            others["--max-sequences 1"] = (dataclasses.replace(settings, max_sequences=1), formats)
        if settings.kv_dtype == "auto":
            others["--kv-dtype int8"] = (dataclasses.replace(settings, kv_dtype="int8"), formats)
        remedies = [words for words, (said, other) in others.items() if facts.would_fit(said, other, least)]
        what = f"a context of {least} tokens" if asked is not None else f"even a context of {least} tokens"
        raise refusal(what, load.pools(least), [f"--context {fits}", *remedies] if fits else remedies)
    # `fits` is in whole pages: the context asked for may fit where its last page, filled, would not.
    tokens = asked if asked is not None else min(most, DEFAULT_CONTEXT_TOKENS, max(fits, least))
    context = Context(
        tokens, most, max(fits, least), context_reason(asked, most, DEFAULT_CONTEXT_TOKENS, max(fits, least))
    )
    load = load.with_useful_kv(tokens)
    pools = load.pools(tokens)
    weights = _stored_weights(parameters, formats, file_bytes)
    held = load.weights
    return LoadPlan(
        runner=load.kind.name,
        layout=load.kind.layout.id,
        config=load.config(tokens),
        dtypes=load.dtypes,
        formats=formats,
        context=context,
        kv_contexts=float(load.contexts),
        weights=weights,
        kv=load.kv(tokens),
        pools=pools,
        declined=declined,
        reasons=(
            device_reason(device),
            *(f"runner {each.runner} declined: {each.reason}" for each in declined),
            runner_reason(load.kind.name, packed=held.packed, own=held.own, mapped=held.mapped),
            f"{load.kind.name} {load.dtypes.reason}",
            f"context {context.reason}",
            *rope_reasons(spec),
            sequences_reason(load.sequences, load.contexts, asked=settings.max_sequences),
            *map(weights_reason, weights),
        ),
        warnings=tuple(tight_warning(pool) for pool in pools if pool.tight),
    )


def kv_group_pages(
    group: KVGroup, *, context_tokens: int, prefill_chunk_tokens: int, contexts: Fraction
) -> int:
    """KV pages of a group that `contexts` sequences of `context_tokens`, at least one, cannot outgrow."""
    return math.ceil(contexts * pages_for_sequence(group.window, context_tokens, prefill_chunk_tokens))


# --- one runner with one choice of formats -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Facts:
    """What stays the same whatever is chosen."""

    spec: ModelSpec
    parameters: Sequence[Parameter]
    kinds: Sequence[RunnerKind]
    machine: Machine
    device: DeviceChoice

    def choose_runner(
        self, settings: Settings, formats: Mapping[str, Format]
    ) -> tuple[_Load, tuple[Declined, ...]]:
        """The first runner that takes the model, and those before it that do not."""
        distinct = tuple(dict.fromkeys(formats.values()))
        tokens = min(settings.context or DEFAULT_CONTEXT_TOKENS, self.spec.max_context_tokens)
        declined: list[Declined] = []
        for kind in self.kinds:
            load = _Load(self, settings, formats, kind, self._dtypes(settings, kind))
            reason = kind.declines(self.spec, distinct, load.config(tokens))
            if reason is None:
                return load, tuple(declined)
            declined.append(Declined(kind.name, reason))
        why = "; ".join(f"{each.runner}: {each.reason}" for each in declined)
        cuda = self.machine.cuda
        if settings.runner == "cuda" and isinstance(cuda, Unusable) and settings.device == "auto":
            raise DeviceError(
                f"runner cuda cannot be used: {cuda.why}", remedy=f"Leave --runner to auto, or: {cuda.remedy}"
            )
        asked = [f"--{name}" for name in ("runner", "isa") if getattr(settings, name) != "auto"]
        asked += ["--activations"] if settings.activations != "int16" else []
        asked += ["--kv-dtype"] if settings.kv_dtype != "auto" else []
        asked += ["--deterministic"] if settings.deterministic else []
        raise IncompatibleModelError(
            f"no runner takes this {self.spec.family} model on {self.device.device} ({why})",
            remedy=f"Leave {' and '.join(asked)} out, so that another runner may take it."
            if asked
            else "Try another --device or --quant, or leave them to auto.",
        )

    def would_fit(self, settings: Settings, formats: Mapping[str, Format], tokens: int) -> bool:
        try:
            load, _ = self.choose_runner(settings, formats)
        except OctavoError:
            return False
        return load.fits(tokens)

    def _dtypes(self, settings: Settings, kind: RunnerKind) -> DtypePolicy:
        gpu = self.machine.gpu(self.device.device)
        return resolve_dtypes(
            dtype=settings.dtype,
            device=self.device.device,
            runner=kind.name,
            family=self.spec.family,
            bfloat16=gpu is None or gpu.bfloat16,
            kv_dtype=settings.kv_dtype,
        )


@dataclass(frozen=True, slots=True)
class _WeightBytes:
    packed: int
    own: int
    """The runner's copy."""
    mapped: int
    """Packed bytes the runner reads where they are: it holds no copy of these parameters."""
    largest: int
    """The largest parameter in float32, as it is while it is packed or dequantized."""


@dataclass(frozen=True)
class _Load:
    """Bytes of one runner with one choice of formats, as functions of the context."""

    facts: _Facts
    settings: Settings
    formats: Mapping[str, Format]
    kind: RunnerKind
    dtypes: DtypePolicy
    contexts: Fraction = Fraction(1)
    """Sequences of the full context that the KV memory holds."""

    @property
    def sequences(self) -> int:
        return self.settings.max_sequences or DEFAULT_SEQUENCES

    def with_useful_kv(self, tokens: int) -> _Load:
        """KV memory for as many of the sequences asked for as fits without getting tight; for one at least."""
        if self.settings.max_sequences is None:
            return self
        pages = pages_for_tokens(tokens)
        fitting, failing = pages, pages * self.sequences + 1
        while failing - fitting > 1:
            middle = (fitting + failing) // 2
            pools = dataclasses.replace(self, contexts=Fraction(middle, pages)).pools(tokens)
            if any(pool.tight for pool in pools):
                failing = middle
            else:
                fitting = middle
        return dataclasses.replace(self, contexts=Fraction(fitting, pages))

    def config(self, tokens: int) -> RunnerConfig:
        on_cpu = self.facts.device.device == "cpu"
        # Of all prompts of a step, not of one: sequences of a short context are to begin together.
        chunk = min(PREFILL_CHUNK_TOKENS, math.ceil(tokens * self.contexts))
        return RunnerConfig(
            device=self.facts.device.device,
            compute_dtype=self.dtypes.compute,
            kv_dtype=self.dtypes.kv,
            context_tokens=tokens,
            max_slots=self.sequences,
            kv_pages=tuple(
                kv_group_pages(
                    group, context_tokens=tokens, prefill_chunk_tokens=chunk, contexts=self.contexts
                )
                for group in self.facts.spec.kv_groups
            ),
            prefill_chunk_tokens=chunk,
            threads=self.settings.threads or (self.facts.machine.cores if on_cpu else None),
            draft_rows=0 if self.settings.speculation == "off" else MAX_DRAFT_ROWS,
            deterministic=self.settings.deterministic,
        )

    def kv(self, tokens: int) -> tuple[KVMemory, ...]:
        spec, groups = self.facts.spec, []
        for group, pages in zip(spec.kv_groups, self.config(tokens).kv_pages, strict=True):
            mixers = [spec.layers[i].mixer for i in group.layers]
            token_bytes = sum(
                2 * mixer.kv_heads * kv_vector_bytes(self.dtypes.kv, mixer.head_dim) for mixer in mixers
            )
            nbytes = pages * KV_PAGE_TOKENS * token_bytes
            groups.append(KVMemory(group.window, len(mixers), pages, nbytes))
        return tuple(groups)

    @functools.cached_property
    def weights(self) -> _WeightBytes:
        packed = own = mapped = largest = 0
        config = self.config(1)
        for parameter in self.facts.parameters:
            stored_as = self.formats[parameter.name]
            stored = _packed_bytes(parameter, stored_as)
            copy = self.kind.weight_bytes(parameter, stored_as, config)
            packed += stored
            own += copy
            mapped += 0 if copy else stored
            largest = max(largest, 4 * math.prod(parameter.shape))
        return _WeightBytes(packed, own, mapped, largest)

    def pools(self, tokens: int) -> tuple[Pool, ...]:
        """The memory that holds weights and KV first."""
        machine, weights = self.facts.machine, self.weights
        gpu = machine.gpu(self.facts.device.device)
        process = self.kind.process_bytes(self.config(tokens))
        process += VOCABULARY_ENTRY_BYTES * self.facts.spec.vocab_size
        running = {
            "weights": weights.own,
            "kv": sum(group.nbytes for group in self.kv(tokens)),
            "activations": self.kind.activation_bytes(self.facts.spec, self.config(tokens)),
        }
        packing = process + weights.packed + weights.largest
        host = {"process": process, "packed weights": weights.mapped}
        host["grammars"] = GRAMMAR_LIBRARY_BYTES + GRAMMAR_ENTRY_BYTES * self.facts.spec.vocab_size
        if gpu is None:
            return (_pool("host", host | running, packing + weights.own, machine.available_bytes),)
        assert gpu.available_bytes is not None
        return (
            _pool(self.facts.device.device, running, weights.own, gpu.available_bytes, gpu.others),
            _pool("host", host, packing, machine.available_bytes),
        )

    def fits(self, tokens: int) -> bool:
        return all(pool.fits for pool in self.pools(tokens))

    def largest_context(self) -> int:
        """In whole KV pages or the model's whole context; 0: none fits."""
        most = self.facts.spec.max_context_tokens
        fitting, failing = 0, pages_for_tokens(most) + 1
        while failing - fitting > 1:
            pages = (fitting + failing) // 2
            if self.fits(min(pages * KV_PAGE_TOKENS, most)):
                fitting = pages
            else:
                failing = pages
        return min(fitting * KV_PAGE_TOKENS, most)


def _pool(
    name: str,
    parts: Mapping[str, int],
    load_peak_bytes: int,
    available_bytes: int,
    others: tuple[CardProcess, ...] = (),
) -> Pool:
    return Pool(
        name=name,
        parts={part: nbytes for part, nbytes in parts.items() if nbytes},
        load_peak_bytes=load_peak_bytes,
        available_bytes=available_bytes,
        usable_bytes=int(available_bytes * (1 - RESERVE_SHARE)),
        others=others,
    )


def _packed_bytes(parameter: Parameter, format: Format) -> int:
    rows = math.prod(parameter.shape[:-1])  # 1 for a vector
    return format.nbytes(rows, parameter.shape[-1])


def _stored_weights(
    parameters: Sequence[Parameter], formats: Mapping[str, Format], file_bytes: Mapping[str, int]
) -> tuple[StoredWeights, ...]:
    """Bytes by format; a source tensor that several parameters share is split by their elements."""
    elements: Counter[str] = Counter()
    for parameter in parameters:
        elements[parameter.source] += math.prod(parameter.shape)
    tensors: Counter[str] = Counter()
    in_file: Counter[str] = Counter()
    packed: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for parameter in parameters:
        source, stored_as = parameter.source, formats[parameter.name]
        # Differences of running sums, so that the parts add up to the source's bytes exactly.
        before = seen[source]
        seen[source] += math.prod(parameter.shape)
        first, end = (file_bytes[source] * part // elements[source] for part in (before, seen[source]))
        tensors[stored_as.name] += 1
        in_file[stored_as.name] += end - first
        packed[stored_as.name] += _packed_bytes(parameter, stored_as)
    parts = [StoredWeights(name, tensors[name], in_file[name], packed[name]) for name in tensors]
    return tuple(sorted(parts, key=lambda part: (-part.packed_bytes, part.format)))
