"""What a model loses in each format, on a text: `prepare` decides from headers, `evaluate` measures.

Perplexity and speed are those of the runner a user gets, through `LLM`. KL divergence, agreement and layer errors
are of the weights alone: both models in fp32 in the reference runner's model, which imports torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.errors import IncompatibleModelError, NotEnoughMemoryError
from octavo.evaluate.estimates import Estimate
from octavo.evaluate.results import Evaluation, FormatQuality
from octavo.evaluate.text import Segments, Text
from octavo.llm import LLM
from octavo.loading import PlannedModel, plan_model
from octavo.quant.logical_layout import REF1
from octavo.settings import QuantName, SamplingParams, Settings
from octavo.text.tokenizer import load_tokenizer
from octavo.types import Progress
from octavo.units import readable_bytes
from octavo.weights import choose_formats, open_weights

if TYPE_CHECKING:
    from octavo.evaluate.divergence import Divergence
    from octavo.evaluate.logits import SegmentLogits

SEGMENT_TOKENS = 512
SPEED_PROMPT_TOKENS = 16
SPEED_NEW_TOKENS = 32
_SPEED_ROUNDS = 3

Bar = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""(what is done, in how many pieces) -> what to call after each piece."""


@contextlib.contextmanager
def no_bar(label: str, total: int) -> Iterator[Callable[[], None]]:
    yield lambda: None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model that was found, fits in every format, and the text in its tokens. No weight has been read."""

    formats: Mapping[str, PlannedModel]
    """By the --quant value, in the order asked for."""
    reference: QuantName | None
    text: Text
    segments: Segments


def prepare(
    settings: Settings,
    *,
    formats: Sequence[QuantName],
    reference: QuantName | None,
    text: Text,
    tokens: int,
    progress: Progress | None = None,
) -> Prepared:
    """Raises what `plan_model` raises, for each format; NotEnoughMemoryError where the models that are compared
    do not fit together; IncompatibleModelError for a model without a tokenizer; EmptyPromptError for a text of
    fewer than two tokens."""
    settings = dataclasses.replace(settings, max_sequences=1)
    any_format = plan_model(dataclasses.replace(settings, quant=formats[0]), progress=progress)
    segment = min(settings.context or SEGMENT_TOKENS, SEGMENT_TOKENS, any_format.spec.max_context_tokens)
    planned: dict[str, PlannedModel] = {
        quant: plan_model(dataclasses.replace(settings, quant=quant, context=segment)) for quant in formats
    }
    first = next(iter(planned.values()))
    if first.source.tokenizer is None:
        raise IncompatibleModelError(
            f"{first.source.location} has no tokenizer, and a text cannot become tokens",
            remedy="Add the model's tokenizer.json to its folder.",
        )
    if reference is not None:
        _require_memory(planned, reference)
    tokenizer = load_tokenizer(first.source.tokenizer, model_vocab_size=first.spec.vocab_size)
    segments = Segments.of(text, tokenizer, tokens=tokens, segment_tokens=first.plan.context.tokens)
    return Prepared(planned, reference, text, segments)


def evaluate(prepared: Prepared, bar: Bar = no_bar) -> Evaluation:
    """Raises what loading raises, and NumericalError where logits were not finite."""
    first = next(iter(prepared.formats.values()))
    measured = {
        quant: _in_its_runner(model, prepared.segments, bar) for quant, model in prepared.formats.items()
    }
    apart = {} if prepared.reference is None else _from_reference(prepared, prepared.reference, bar)
    return Evaluation(
        model=first.source.location,
        revision=first.source.revision,
        fingerprint=first.source.fingerprint,
        text=prepared.text.name,
        scored_tokens=prepared.segments.scored_tokens,
        segment_tokens=first.plan.context.tokens,
        reference=prepared.reference,
        stored_as=" + ".join(first.source.quantized_as) or None,
        machine=platform.machine(),
        formats=tuple(
            dataclasses.replace(quality, divergence=apart.get(quant)) for quant, quality in measured.items()
        ),
    )


def _in_its_runner(planned: PlannedModel, segments: Segments, bar: Bar) -> FormatQuality:
    with (
        LLM.from_settings(planned.settings) as llm,
        bar(f"{planned.settings.quant}: perplexity", len(segments.ids)) as done,
    ):
        losses: list[float] = []
        for segment in segments.ids:
            losses += [-logprob for logprob in llm.score(segment).logprobs]
            done()
        speed = _decode_speed(llm, segments.ids[0])
        info = llm.info()
    matrices = [p for p in planned.parameters if p.role != "vector"]
    nbytes = sum(planned.plan.formats[p.name].nbytes(math.prod(p.shape[:-1]), p.shape[-1]) for p in matrices)
    return FormatQuality(
        format=planned.settings.quant,
        stored_as=info["quant"],
        weight_bytes=planned.plan.packed_bytes,
        bits_per_weight=8 * nbytes / sum(math.prod(p.shape) for p in matrices),
        device=info["device"],
        runner=info["runner"],
        decode_tokens_per_second=speed,
        perplexity=Estimate.of(losses).exponential(),
        divergence=None,
    )


def _decode_speed(llm: LLM, segment: Sequence[int]) -> float | None:
    """Median tokens a second after a short prompt; None where the context is too small to say."""
    if llm.context_tokens < SPEED_PROMPT_TOKENS + SPEED_NEW_TOKENS:
        return None
    params = SamplingParams(max_new_tokens=SPEED_NEW_TOKENS, temperature=0.0, ignore_eos=True)
    rates = [
        llm.generate(list(segment[:SPEED_PROMPT_TOKENS]), params).timings.decode_tokens_per_second
        for _ in range(_SPEED_ROUNDS)
    ]
    return statistics.median(rate for rate in rates if rate is not None)


def _from_reference(prepared: Prepared, reference: QuantName, bar: Bar) -> dict[str, Divergence]:
    from octavo.evaluate.divergence import divergences

    planned = next(iter(prepared.formats.values()))
    passes = (1 + len(prepared.formats)) * len(prepared.segments.ids)
    with bar(f"distance from {reference}", passes) as done:
        truth = _segment_model(planned, reference)
        others = {quant: _segment_model(planned, quant) for quant in prepared.formats}
        return divergences(truth, others, prepared.segments.ids, done)


def _segment_model(planned: PlannedModel, quant: str) -> SegmentLogits:
    from octavo.evaluate.logits import SegmentLogits

    weights = open_weights(
        model=planned.source.location,
        fingerprint=planned.source.fingerprint,
        tensors=planned.source.tensors,
        parameters=planned.parameters,
        formats=choose_formats(planned.parameters, planned.source.tensors, quant),
        layout=REF1,
        cache_dir=None,
        use_cache=False,
    )
    return SegmentLogits(planned.spec, weights, planned.plan.context.tokens)


def _require_memory(planned: Mapping[str, PlannedModel], reference: QuantName) -> None:
    """Each compared model is held in fp32, and the largest packing on top."""
    one = next(iter(planned.values()))
    host = one.plan.pools[-1]
    model_bytes = 4 * sum(math.prod(parameter.shape) for parameter in one.parameters)
    needed = (len(planned) + 2) * model_bytes
    if needed > host.usable_bytes:
        raise NotEnoughMemoryError(
            f"comparing {len(planned)} formats with {reference} holds {len(planned) + 1} models in fp32 and packs "
            f"one more: {readable_bytes(needed)}; {readable_bytes(host.usable_bytes)} may be used",
            remedy="Leave --reference out (perplexity alone takes no such memory), or name fewer formats.",
            needed_bytes=needed,
            available_bytes=host.usable_bytes,
        )
