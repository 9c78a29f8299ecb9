"""Settings: every name, type and range, and that a misspelling is met with the right spelling."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.errors import InvalidParameterError
from octavo.settings import Settings
from octavo.validate import validate_settings


def settings(**changes: Any) -> Settings:
    return Settings(**changes)


@pytest.mark.parametrize(
    "said",
    [
        {},
        {
            "model": "org/name",
            "revision": "main",
            "quant": "llm-int8",
            "device": "cuda:3",
            "dtype": "bfloat16",
        },
        {"context": 1, "max_sequences": 1, "threads": 1, "offline": True, "cache": False},
        {"context": 1 << 24, "max_sequences": 256, "threads": 1024},
    ],
)
def test_good_settings_come_back_as_they_were(said: dict[str, Any]) -> None:
    assert validate_settings(settings(**said)) == settings(**said)


def test_paths_and_numpy_numbers_become_plain() -> None:
    clean = validate_settings(settings(model=Path("a/b"), cache_dir="c", context=np.int64(7)))
    assert clean.model == str(Path("a/b"))
    assert clean.cache_dir == Path("c")
    assert type(clean.context) is int


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("model", ["", "a\0b", b"x", 3, "\ud800"]),
        ("revision", ["", 1]),
        ("quant", ["INT8", "int9", None, 8, ["int8"]]),
        ("device", ["gpu", "cuda:x", None]),
        ("dtype", ["half", "float64", None]),
        ("context", [0, -1, True, 1.0, "8192", (1 << 24) + 1, 10**5000]),
        ("max_sequences", [0, 257, "8", False, float("nan")]),
        ("speculation", ["on", "ngram", None, True]),
        ("threads", [0, 1025, "4"]),
        ("offline", [0, "no", None]),
        ("cache", [1, "yes"]),
        ("cache_dir", ["", 5]),
    ],
)
def test_bad_values_name_their_field(field: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(InvalidParameterError, match=field) as caught:
            validate_settings(settings(**{field: value}))
        assert caught.value.parameter == field
        assert caught.value.remedy


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({"quant": "int-8"}, "int8"),
        ({"quant": "llmint8"}, "llm-int8"),
        ({"dtype": "bfloat"}, "bfloat16"),
        ({"dtype": "flaot32"}, "float32"),
    ],
)
def test_a_misspelled_name_is_met_with_the_right_one(said: dict[str, Any], meant: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        validate_settings(settings(**said))
    assert caught.value.remedy == f"Did you mean {meant}?"


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.lists(st.integers()),
    st.complex_numbers(),
)


@hypothesis.settings(deadline=None)
@given(st.sampled_from([field.name for field in dataclasses.fields(Settings)]), anything)
def test_any_value_is_taken_or_refused_by_name(field: str, value: object) -> None:
    try:
        validate_settings(settings(**{field: value}))
    except InvalidParameterError as error:
        said = error.parameter
    else:
        said = field
    assert said == field


@hypothesis.settings(deadline=None)
@given(anything)
def test_only_settings_are_settings(value: object) -> None:
    with pytest.raises(InvalidParameterError):
        validate_settings(value)
