"""The dtype policy: what is chosen where, and which wishes contradict what."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest

from octavo.dtypes import DTYPE_BYTES, Dtype, DtypePolicy, KVDtype, kv_vector_bytes, resolve_dtypes
from octavo.errors import InvalidParameterError
from octavo.settings import DtypeName


def resolve(**changes: Any) -> DtypePolicy:
    said: dict[str, Any] = {
        "dtype": "auto",
        "device": "cuda:0",
        "runner": "cuda",
        "family": "llama",
        "bfloat16": True,
    }
    return resolve_dtypes(**(said | changes))


@pytest.mark.parametrize(
    ("said", "compute", "kv"),
    [
        ({}, "bfloat16", "bfloat16"),
        ({"bfloat16": False}, "float16", "float16"),
        ({"bfloat16": False, "family": "gemma2"}, "float32", "float16"),
        ({"device": "cpu", "runner": "cpu"}, "float32", "float16"),
        ({"device": "cpu", "runner": "reference"}, "float32", "float32"),
        ({"device": "mps", "runner": "reference"}, "float32", "float32"),
        ({"runner": "reference"}, "bfloat16", "bfloat16"),
        ({"dtype": "float32"}, "float32", "float16"),
        ({"dtype": "float16"}, "float16", "float16"),
        ({"kv_dtype": "int8"}, "bfloat16", "int8"),
        (
            {"dtype": "bfloat16", "device": "cpu", "runner": "reference", "bfloat16": False},
            "bfloat16",
            "bfloat16",
        ),
    ],
)
def test_choices(said: dict[str, Any], compute: str, kv: str) -> None:
    policy = resolve(**said)
    assert (policy.compute, policy.kv, policy.accumulate) == (compute, kv, "float32")
    assert compute in policy.reason
    assert kv in policy.reason


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"dtype": "float16", "device": "cpu", "runner": "reference"}, ("float16", "contradicts device cpu")),
        ({"dtype": "float16", "family": "gemma2"}, ("float16", "gemma2")),
        (
            {"dtype": "bfloat16", "device": "cuda:1", "bfloat16": False},
            ("bfloat16", "contradicts device cuda:1"),
        ),
    ],
)
def test_contradictions_name_both(said: dict[str, Any], named: tuple[str, str]) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        resolve(**said)
    assert caught.value.parameter == "dtype"
    assert all(word in caught.value.message for word in named)


def test_every_refusal_suggests_a_dtype_that_is_not_refused() -> None:
    refused = 0
    for dtype, device, family, bfloat16 in itertools.product(
        get_args(DtypeName), ("cpu", "mps", "cuda:0"), ("llama", "gemma2"), (True, False)
    ):
        said = {"dtype": dtype, "device": device, "family": family, "bfloat16": bfloat16}
        try:
            resolve(**said)
        except InvalidParameterError as error:
            refused += 1
            suggested = error.remedy.removeprefix("Use --dtype ").partition(",")[0]
            assert resolve(**(said | {"dtype": suggested})).compute == suggested
    assert refused


def test_every_dtype_has_its_size() -> None:
    assert set(DTYPE_BYTES) == set(get_args(Dtype))
    assert [kv_vector_bytes(kv, 64) for kv in get_args(KVDtype)] == [256, 128, 128, 68]
