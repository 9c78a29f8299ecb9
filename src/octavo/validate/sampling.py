"""`SamplingParams`: ranges, and what holds where the user said nothing. Shape letter: V vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from octavo.errors import InvalidParameterError
from octavo.settings import SamplingParams
from octavo.types import LogitsProcessor, Sampling
from octavo.validate.grammar import resolve_grammar
from octavo.validate.limits import DEFAULT_LIMITS, Limits
from octavo.validate.settings import MAX_CONTEXT_TOKENS
from octavo.validate.values import Range, at_most, flag, integer, not_unicode, shown, wrong

BEAM_SEARCH_NAMES = (
    "num_beams",
    "best_of",
    "use_beam_search",
    "beam_width",
    "length_penalty",
    "num_beam_groups",
    "diversity_penalty",
    "early_stopping",
)
"""Fields of other programs that ask for beam search, which Octavo does not have."""

BEAM_SEARCH_REMEDY = (
    "Leave it out: there is no beam search. Take temperature 0 for the most probable tokens, or n for several "
    "answers."
)

ValueT = TypeVar("ValueT")

MAX_SEED = (1 << 64) - 1

_SAMPLING_RANGES: Mapping[str, Range] = {
    "temperature": Range(float, 0, 100),
    "top_k": Range(int, 0, (1 << 31) - 1),
    "top_p": Range(float, 0, 1, above=True),
    "min_p": Range(float, 0, 1),
    "repetition_penalty": Range(float, 0, 10, above=True),
    "presence_penalty": Range(float, -2, 2),
    "frequency_penalty": Range(float, -2, 2),
}
_FROM_GENERATION_CONFIG = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_OTHER_SAMPLERS: Mapping[str, object] = {
    "num_beams": 1,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "penalty_alpha": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "guidance_scale": None,
}
"""Keys of generation_config that would change what is sampled and are not in our law, with their off value."""


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """A model's own sampling values, from its generation_config; neutral where it has none."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    notices: tuple[str, ...] = ()
    """What generation_config says that is not followed, in words for the user."""


def read_sampling_defaults(generation_config: Mapping[str, object]) -> SamplingDefaults:
    """The defaults a model brings. do_sample false means greedy.

    A value that makes no sense is left out with a notice, never an error: it is only a default, and the model
    is fine.
    """
    values: dict[str, Any] = {}
    notices = []
    for name in _FROM_GENERATION_CONFIG:
        said = generation_config.get(name)
        number = _SAMPLING_RANGES[name].read(said)
        if number is not None:
            values[name] = number
        elif said is not None:
            notices.append(
                f"generation_config: {name} is {shown(said)}, not {_SAMPLING_RANGES[name]}: ignored"
            )
    if generation_config.get("do_sample") is False:
        values["temperature"] = 0.0
    for name, off in _OTHER_SAMPLERS.items():
        said = generation_config.get(name)
        if said not in (None, off, []):
            notices.append(f"generation_config: {name} = {shown(said)} is not followed")
    return SamplingDefaults(**values, notices=tuple(notices))


def validate_sampling_params(
    params: object, *, vocab_size: int, limits: Limits = DEFAULT_LIMITS
) -> SamplingParams:
    """Every field checked and made plain: numpy numbers become Python's, one stop string a tuple of one.

    A None stays None. `logit_bias` comes back as a dict with int keys, sorted; keys may be decimal strings, the
    only ones JSON has. Raises InvalidParameterError.
    """
    if not isinstance(params, SamplingParams):
        raise wrong("params", params, "an octavo.SamplingParams")
    ranges = {
        **_SAMPLING_RANGES,
        "max_new_tokens": Range(int, 1, MAX_CONTEXT_TOKENS),
        "seed": Range(int, 0, MAX_SEED),
        "logprobs": Range(int, 0, limits.logprobs),
        "prompt_logprobs": Range(int, 0, limits.logprobs),
        "n": Range(int, 1, limits.choices),
    }
    values = {
        name: allowed.require(name, getattr(params, name))
        for name, allowed in ranges.items()
        if getattr(params, name) is not None
    }
    grammar = resolve_grammar(params, limits=limits)
    return dataclasses.replace(
        params,
        **values,
        logit_bias=_logit_bias(params.logit_bias, vocab_size, limits),
        stop=_stop_strings(params.stop, limits),
        stop_token_ids=_stop_token_ids(params.stop_token_ids, vocab_size, limits),
        ignore_eos=flag("ignore_eos", params.ignore_eos),
        json_schema=None if grammar is None or params.json_schema is None else grammar.text,
        logits_processors=_logits_processors(params.logits_processors, limits),
    )


def resolve_sampling(
    params: object,
    *,
    defaults: SamplingDefaults,
    vocab_size: int,
    seed_source: Callable[[], int],
    limits: Limits = DEFAULT_LIMITS,
) -> Sampling:
    """The sampling law's parameters: what the user said, else the model's default, else neutral.

    `seed_source` gives a seed below 2**64 where the user gave none. Raises InvalidParameterError.
    """
    said = validate_sampling_params(params, vocab_size=vocab_size, limits=limits)
    neutral = Sampling()
    return Sampling(
        temperature=_first(said.temperature, defaults.temperature),
        top_k=_first(said.top_k, defaults.top_k),
        top_p=_first(said.top_p, defaults.top_p),
        min_p=_first(said.min_p, defaults.min_p),
        repetition_penalty=_first(said.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=_first(said.presence_penalty, neutral.presence_penalty),
        frequency_penalty=_first(said.frequency_penalty, neutral.frequency_penalty),
        logit_bias=tuple((said.logit_bias or {}).items()),
        seed=seed_source() if said.seed is None else said.seed,
        logprobs=said.logprobs,
    )


def _first(said: ValueT | None, default: ValueT) -> ValueT:
    return default if said is None else said


def _logit_bias(given: object, vocab_size: int, limits: Limits) -> dict[int, float] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise wrong("logit_bias", given, "a mapping of token ids to numbers")
    at_most("logit_bias", len(given), limits.logit_bias, "entries")
    values = Range(float, -100, 100)
    bias: dict[int, float] = {}
    for key, value in given.items():
        decimal = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 20
        token_id = _token_id("logit_bias", int(key) if decimal else key, vocab_size)
        if token_id in bias:
            raise InvalidParameterError(
                f"logit_bias names token id {token_id} twice",
                remedy="Give one value for each token id.",
                parameter="logit_bias",
            )
        bias[token_id] = values.require("logit_bias", value)
    return dict(sorted(bias.items()))


def _stop_strings(given: object, limits: Limits) -> tuple[str, ...]:
    texts = (given,) if isinstance(given, str) else given
    if not isinstance(texts, (tuple, list)):
        raise wrong("stop", given, "a string or a list of strings")
    at_most("stop", len(texts), limits.stop_strings, "strings")
    for text in texts:
        if not isinstance(text, str) or not 0 < len(text) <= limits.stop_characters:
            raise wrong("stop", text, f"a string of 1 to {limits.stop_characters} characters")
        if (offset := not_unicode(text)) is not None:
            raise wrong("stop", text, f"Unicode text (character {offset} is half a surrogate pair)")
    return tuple(str(text) for text in texts)


def _stop_token_ids(given: object, vocab_size: int, limits: Limits) -> tuple[int, ...]:
    if not isinstance(given, (tuple, list, set, frozenset, range)):
        raise wrong("stop_token_ids", given, "a list of token ids")
    at_most("stop_token_ids", len(given), limits.stop_token_ids, "ids")
    return tuple(_token_id("stop_token_ids", value, vocab_size) for value in given)


def _token_id(parameter: str, value: object, vocab_size: int) -> int:
    token_id = integer(value)
    if token_id is None or not 0 <= token_id < vocab_size:
        raise wrong(parameter, value, f"a token id from 0 to {vocab_size - 1}, this model's last")
    return token_id


def _logits_processors(given: object, limits: Limits) -> tuple[LogitsProcessor, ...]:
    if not isinstance(given, (tuple, list)) or not all(callable(each) for each in given):
        raise wrong("logits_processors", given, "a list of functions (token_ids, logits) -> logits")
    at_most("logits_processors", len(given), limits.logits_processors, "functions")
    return tuple(given)
