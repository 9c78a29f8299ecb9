"""Sampling parameters: ranges, strict types, and whose value holds."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.errors import InvalidGrammarError, InvalidParameterError
from octavo.settings import SamplingParams
from octavo.types import Sampling
from octavo.validate import (
    Limits,
    SamplingDefaults,
    read_sampling_defaults,
    resolve_sampling,
    validate_sampling_params,
)

V = 1000
NAN, INFINITY = float("nan"), float("inf")


def checked(**said: Any) -> SamplingParams:
    return validate_sampling_params(SamplingParams(**said), vocab_size=V)


def resolved(defaults: SamplingDefaults | None = None, **said: Any) -> Sampling:
    return resolve_sampling(
        SamplingParams(**said), defaults=defaults or SamplingDefaults(), vocab_size=V, seed_source=lambda: 99
    )


ACCEPTED: dict[str, list[Any]] = {
    "max_new_tokens": [1, 1 << 24],
    "temperature": [0, 0.0, 1e-9, 100],
    "top_k": [0, 1, (1 << 31) - 1],
    "top_p": [1, 1e-9, 0.5],
    "min_p": [0, 1, 0.05],
    "repetition_penalty": [1e-9, 10, 1.1],
    "presence_penalty": [-2, 2, 0.0],
    "frequency_penalty": [-2, 2],
    "seed": [0, (1 << 64) - 1],
    "logprobs": [0, 20],
}
REFUSED: dict[str, list[Any]] = {
    "max_new_tokens": [0, -1, (1 << 24) + 1, 2.0, "5"],
    "temperature": [-1e-9, 100.1, -1, 10**400],
    "top_k": [-1, 1 << 31, 1.5],
    "top_p": [0, -0.1, 1.0001],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, -1, 10.5],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-3, 3],
    "seed": [-1, 1 << 64, 1.0],
    "logprobs": [-1, 21, 1.0],
}


@pytest.mark.parametrize("field", ACCEPTED)
def test_ranges(field: str) -> None:
    for value in ACCEPTED[field]:
        assert getattr(checked(**{field: value}), field) == value
    for value in [*REFUSED[field], True, NAN, INFINITY, -INFINITY, "1", [1], 1 + 0j, b"1"]:
        with pytest.raises(InvalidParameterError, match=field) as caught:
            checked(**{field: value})
        assert caught.value.parameter == field
        assert caught.value.remedy


def test_numbers_become_plain() -> None:
    clean = checked(temperature=np.float32(0.5), top_k=np.int64(3), top_p=Fraction(1, 2), min_p=0)
    assert [type(v) for v in (clean.temperature, clean.top_k, clean.top_p, clean.min_p)] == [
        float,
        int,
        float,
        float,
    ]


def test_nothing_said_stays_nothing() -> None:
    assert checked() == SamplingParams()


# --- bias, stops -----------------------------------------------------------------------------------


def test_logit_bias_comes_back_sorted_with_int_keys() -> None:
    clean = checked(logit_bias={"999": 1, 3: -100, np.int32(0): 100.0})
    assert clean.logit_bias == {0: 100.0, 3: -100.0, 999: 1.0}
    assert resolved(logit_bias={5: 1, 2: 2}).logit_bias == ((2, 2.0), (5, 1.0))


@pytest.mark.parametrize(
    "bias",
    [
        {V: 1},
        {-1: 1},
        {2**31: 1},
        {2**63: 1},
        {True: 1},
        {"1.0": 1},
        {"-1": 1},
        {"٣": 1},
        {"9" * 5000: 1},
        {1.0: 1},
        {None: 1},
        {1: 100.5},
        {1: NAN},
        {1: INFINITY},
        {1: "1"},
        {1: True},
        {1: None},
        {1: 1, "1": 1},
        [(1, 1)],
        "1",
        dict.fromkeys(range(1025), 1),
    ],
)
def test_bad_logit_bias(bias: object) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        validate_sampling_params(SamplingParams(logit_bias=bias), vocab_size=V)  # type: ignore[arg-type]
    assert caught.value.parameter == "logit_bias"


def test_logit_bias_may_have_as_many_entries_as_the_limit_says() -> None:
    many = dict.fromkeys(range(1024), 1.0)
    assert validate_sampling_params(SamplingParams(logit_bias=many), vocab_size=2000).logit_bias == many


def test_one_stop_string_is_not_taken_apart() -> None:
    assert checked(stop="END").stop == ("END",)
    assert checked(stop=["a", "b"]).stop == ("a", "b")
    assert checked(stop=("x" * 256,) * 16).stop == ("x" * 256,) * 16


@pytest.mark.parametrize(
    "stop", ["", ("a", ""), ("x" * 257,), ("a",) * 17, (b"a",), (1,), None, {"a"}, "\ud800", 5]
)
def test_bad_stop(stop: Any) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        checked(stop=stop)
    assert caught.value.parameter == "stop"


def test_stop_token_ids() -> None:
    assert checked(stop_token_ids=[0, V - 1, np.int64(4)]).stop_token_ids == (0, V - 1, 4)
    for bad in ([V], [-1], [True], [1.0], ["1"], None, 3, range(257), [2**63]):
        with pytest.raises(InvalidParameterError) as caught:
            checked(stop_token_ids=bad)
        assert caught.value.parameter == "stop_token_ids"


def test_limits_can_be_tighter() -> None:
    tight = Limits(logprobs=5, stop_strings=1)
    for said in ({"logprobs": 6}, {"stop": ("a", "b")}):
        with pytest.raises(InvalidParameterError):
            validate_sampling_params(SamplingParams(**said), vocab_size=V, limits=tight)  # type: ignore[arg-type]


# --- whose value holds -----------------------------------------------------------------------------


def test_user_before_model_before_neutral() -> None:
    model = read_sampling_defaults({"temperature": 0.6, "top_k": 20, "top_p": 0.9, "do_sample": True})
    assert model == SamplingDefaults(temperature=0.6, top_k=20, top_p=0.9)
    assert resolved(model, top_k=0, temperature=1) == Sampling(temperature=1.0, top_k=0, top_p=0.9, seed=99)
    assert resolved() == Sampling(seed=99)
    assert resolved(seed=0).seed == 0


def test_do_sample_false_is_greedy_unless_the_user_says_otherwise() -> None:
    greedy = read_sampling_defaults({"do_sample": False, "temperature": 0.7})
    assert resolved(greedy).temperature == 0
    assert resolved(greedy, temperature=0.3).temperature == 0.3


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": "many"}, "top_k is 'many'"),
        ({"repetition_penalty": NAN}, "repetition_penalty is nan"),
        ({"min_p": True}, "min_p is True"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size = 3"),
        ({"suppress_tokens": [1]}, "suppress_tokens"),
        ({"num_beams": 4}, "num_beams = 4"),
    ],
)
def test_nonsense_in_generation_config_is_ignored_with_a_notice(said: dict[str, Any], named: str) -> None:
    defaults = read_sampling_defaults(said)
    assert dataclasses.replace(defaults, notices=()) == SamplingDefaults()
    (notice,) = defaults.notices
    assert named in notice


def test_what_is_switched_off_in_generation_config_needs_no_notice() -> None:
    config = {
        "num_beams": 1,
        "typical_p": 1.0,
        "no_repeat_ngram_size": 0,
        "suppress_tokens": [],
        "top_k": None,
    }
    assert read_sampling_defaults({**config, "eos_token_id": [1, 2], "max_length": 20}) == SamplingDefaults()


# --- anything at all -------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.complex_numbers(),
    st.fractions(),
    st.decimals(allow_nan=False),
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(scalars, inner, max_size=4),
    max_leaves=8,
)
FIELDS = [field.name for field in dataclasses.fields(SamplingParams)]


@hypothesis.settings(deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), anything, max_size=3))
def test_any_values_give_a_lawful_sampling_or_a_named_refusal(said: dict[str, Any]) -> None:
    try:
        found = resolved(**said)
    except InvalidParameterError as error:
        refused = error.parameter
        assert refused in said, "a refusal names a field that was said"
        return
    except InvalidGrammarError:
        assert {"json_schema", "regex", "lark"} & set(said)
        return
    assert 0 <= found.temperature <= 100
    assert 0 < found.top_p <= 1
    assert 0 <= found.min_p <= 1
    assert 0 < found.repetition_penalty <= 10
    assert 0 <= found.seed < 1 << 64
    assert all(0 <= i < V and math.isfinite(v) for i, v in found.logit_bias)
    assert list(found.logit_bias) == sorted(found.logit_bias)


@hypothesis.settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*FIELDS, "do_sample", "num_beams"]), anything))
def test_no_generation_config_is_an_error(config: dict[str, Any]) -> None:
    defaults = read_sampling_defaults(config)
    assert resolved(dataclasses.replace(defaults, notices=())).top_p > 0


@hypothesis.settings(deadline=None)
@given(anything)
def test_only_sampling_params_are_sampling_params(value: object) -> None:
    with pytest.raises(InvalidParameterError):
        validate_sampling_params(value, vocab_size=V)
