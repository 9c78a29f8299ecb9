"""Plain storage against torch's own bfloat16 and float16."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from octavo.errors import ModelFormatError
from octavo.quant.plain import Plain, from_bf16, to_bf16

FINITE_BITS = st.integers(0, 2**32 - 1).filter(lambda bits: bits & 0x7F800000 != 0x7F800000)


@settings(deadline=None)
@given(arrays(np.uint32, st.integers(1, 40), elements=FINITE_BITS))
def test_bf16_rounds_as_torch(bits: np.ndarray):
    values = bits.view(np.float32)
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(to_bf16(values), expected)


def test_bf16_ties_go_to_even():
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001], np.uint32).view(np.float32)
    np.testing.assert_array_equal(to_bf16(ties), np.array([0x3F80, 0x3F82, 0x3F81], np.uint16))


def test_every_bf16_comes_back():
    patterns = np.arange(2**16, dtype=np.uint16)
    finite = patterns[(patterns & 0x7F80) != 0x7F80]
    np.testing.assert_array_equal(to_bf16(from_bf16(finite)), finite)
    np.testing.assert_array_equal(
        from_bf16(finite), torch.from_numpy(finite.view(np.int16)).view(torch.bfloat16).float().numpy()
    )


@settings(deadline=None)
@given(arrays(np.float16, (3, 5), elements=st.floats(width=16, allow_nan=False, allow_infinity=False)))
def test_f16_is_exact(values: np.ndarray):
    packed = Plain("f16").pack(values.astype(np.float32))
    assert packed["values"].dtype == np.float16
    np.testing.assert_array_equal(Plain("f16").unpack(packed, 5), values.astype(np.float32))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_bytes_rows_and_vectors(dtype):
    plain = Plain(dtype)
    weight = np.arange(-6, 6, dtype=np.float32).reshape(4, 3)
    packed = plain.pack(weight)
    assert plain.nbytes(4, 3) == packed["values"].nbytes
    np.testing.assert_array_equal(plain.unpack(packed, 3), weight)
    chosen = plain.select_rows(packed, np.array([3, 0]))
    np.testing.assert_array_equal(plain.unpack(chosen, 3), weight[[3, 0]])
    np.testing.assert_array_equal(plain.unpack(plain.pack(weight[0]), 3), weight[0])


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(dtype, bad):
    weight = np.ones((2, 3), np.float32)
    weight[1, 2] = bad
    with pytest.raises(ModelFormatError, match="1 weights are infinite or not numbers"):
        Plain(dtype).pack(weight)


def test_nan_of_all_ones_is_refused():
    """Its bits would wrap to a zero when rounded."""
    weight = np.full((1, 2), 0xFFFFFFFF, np.uint32).view(np.float32)
    with pytest.raises(ModelFormatError):
        Plain("bf16").pack(weight)


@pytest.mark.parametrize(("dtype", "large"), [("f16", 65520.0), ("bf16", 3.4e38)])
def test_what_rounds_to_infinity_is_refused(dtype, large):
    with pytest.raises(ModelFormatError, match=dtype):
        Plain(dtype).pack(np.full((1, 2), large, np.float32))
