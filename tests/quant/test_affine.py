"""Affine formats: laws that hold for every weight, and the edges where they could break."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from octavo.errors import ModelFormatError
from octavo.quant.affine import INT4, INT8, LLM_INT8, Q4_1, Q8_0, Affine
from octavo.quant.codebook import NF4
from octavo.quant.nibbles import join_nibbles, split_nibbles

FORMATS = [INT8, LLM_INT8, Q8_0, Q4_1]


@st.composite
def weights(draw: st.DrawFn, multiple: int = 1) -> np.ndarray:
    """[N, K] over all magnitudes a float16 scale can serve; groups of zeros and single spikes among them."""
    rows = draw(st.integers(1, 5))
    columns = draw(st.integers(1, 200 // multiple)) * multiple
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    exponents = random.uniform(draw(st.integers(-30, 0)), draw(st.integers(0, 12)), (rows, columns))
    weight = (random.choice([-1.0, 1.0], (rows, columns)) * 2.0**exponents).astype(np.float32)
    weight[random.random((rows, columns)) < draw(st.sampled_from([0.0, 0.5, 0.99]))] = 0
    return weight


def group_scales(scales: np.ndarray, group: int, columns: int) -> np.ndarray:
    return np.repeat(scales.astype(np.float64), group, axis=1)[:, :columns]


@settings(deadline=None)
@given(weights())
def test_int8_is_within_half_a_step_everywhere(weight: np.ndarray):
    """Half a step of the stored scale is the least any symmetric code can promise."""
    rows, columns = weight.shape
    packed = INT8.pack(weight)
    assert packed["codes"].shape == (rows, columns)
    assert packed["codes"].dtype == np.int8
    assert packed["scales"].shape == (rows, -(-columns // 64))
    assert packed["scales"].dtype == np.float16
    assert packed["codes"].min() >= -127
    steps = group_scales(packed["scales"], 64, columns)
    largest = np.maximum.reduceat(np.abs(weight), np.arange(0, columns, 64), axis=1)
    error = np.abs(INT8.unpack(packed, columns) - weight.astype(np.float64))
    assert (error <= steps * 0.5 * (1 + 1e-5)).all()
    # The scale is the largest weight's, but for float16's own rounding, relative or (below 2**-14) absolute.
    exact = group_scales(largest / 127, 64, columns)
    assert (np.abs(steps - exact) <= exact * 2**-11 + 2.0**-24 + (exact < 2**-14) * 2.0**-24).all()


@settings(deadline=None)
@given(weights())
def test_int8_codes_are_the_nearest(weight: np.ndarray):
    """No neighbouring code is closer: rounding is against the stored scale, not the exact one."""
    columns = weight.shape[1]
    packed = INT8.pack(weight)
    error = np.abs(INT8.unpack(packed, columns) - weight.astype(np.float64))
    for step in (-1, 1):
        moved = np.clip(packed["codes"].astype(np.int16) + step, -127, 127).astype(np.int8)
        other = np.abs(INT8.unpack(packed | {"codes": moved}, columns) - weight.astype(np.float64))
        assert (error <= other * (1 + 1e-5) + 1e-12).all()


def test_rounding_against_the_exact_scale_would_be_seen():
    """The control for the test above: it fails for codes made with the scale before float16 rounding."""
    weight = np.random.default_rng(3).standard_normal((64, 64)).astype(np.float32)
    packed = INT8.pack(weight)
    exact = np.abs(weight).max(axis=1, keepdims=True) / 127
    careless = np.rint(weight / exact).astype(np.int8)
    good = np.abs(INT8.unpack(packed, 64) - weight)
    bad = np.abs(INT8.unpack(packed | {"codes": careless}, 64) - weight)
    assert (bad > good * (1 + 1e-5) + 1e-12).any()
    assert not (good > bad * (1 + 1e-5) + 1e-12).any()


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 100, 127, 128, 577])
@pytest.mark.parametrize("rows", [1, 7])
def test_int8_takes_any_width(rows, columns):
    weight = np.random.default_rng(columns).standard_normal((rows, columns)).astype(np.float32)
    packed = INT8.pack(weight)
    assert sum(array.nbytes for array in packed.values()) == INT8.nbytes(rows, columns)
    for first in range(0, columns, 64):
        alone = INT8.pack(weight[:, first : first + 64])
        np.testing.assert_array_equal(packed["codes"][:, first : first + 64], alone["codes"])
        np.testing.assert_array_equal(packed["scales"][:, first // 64], alone["scales"][:, 0])


def test_int8_zero_groups():
    weight = np.zeros((2, 130), np.float32)
    weight[1, 64:128] = 1
    packed = INT8.pack(weight)
    np.testing.assert_array_equal(INT8.unpack(packed, 130)[0], 0)
    np.testing.assert_array_equal(packed["scales"] == 0, [[True, True, True], [True, False, True]])


@pytest.mark.parametrize("magnitude", [1e-9, 2.9e-8, 6e-8, 1e-6, 3.8e-6, 1e-4, 7e-3, 8e-3])
def test_int8_subnormal_scales(magnitude):
    """Below 2**-14 a float16 scale rounds coarsely: no code may leave -127..127, none loses half a step."""
    weight = (np.linspace(-1, 1, 64) * magnitude).astype(np.float32)[None]
    packed = INT8.pack(weight)
    error = np.abs(INT8.unpack(packed, 64) - weight)
    assert error.max() <= 0.5 * float(packed["scales"].max()) * (1 + 1e-5)
    assert float(packed["scales"].max()) <= magnitude / 127 + 2.0**-24


def test_int8_scale_overflow_is_refused():
    INT8.pack(np.full((1, 64), 8.3e6, np.float32))
    with pytest.raises(ModelFormatError, match="float16 scales"):
        INT8.pack(np.full((1, 64), 8.4e6, np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
def test_what_is_not_finite_is_refused(form, bad):
    weight = np.ones((3, 64), np.float32)
    weight[2, 63] = bad
    with pytest.raises(ModelFormatError):
        form.pack(weight)


@pytest.mark.parametrize("form", [Q8_0, Q4_1], ids=lambda f: f.name)
def test_ggml_formats_need_whole_blocks(form):
    with pytest.raises(ModelFormatError, match="multiple of 32 columns, not 33"):
        form.pack(np.ones((1, 33), np.float32))


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
@settings(deadline=None)
@given(data=st.data())
def test_rows_are_independent(form: Affine, data: st.DataObject):
    """Packed rows chosen are chosen rows packed; and bytes are as announced."""
    weight = data.draw(weights(multiple=32 if form.rounding == "ggml" else 1))
    rows, columns = weight.shape
    packed = form.pack(weight)
    assert sum(array.nbytes for array in packed.values()) == form.nbytes(rows, columns)
    order = np.array(data.draw(st.permutations(range(rows))))
    for chosen in (order, slice(1, rows), slice(0, 0)):
        taken = form.select_rows(packed, chosen)
        np.testing.assert_array_equal(form.unpack(taken, columns), form.unpack(packed, columns)[chosen])
        for name, array in form.pack(weight[chosen]).items():
            np.testing.assert_array_equal(taken[name], array)


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
def test_one_flipped_code_is_one_other_weight(form):
    weight = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    packed = form.pack(weight)
    whole = form.unpack(packed, 64)
    codes = packed["codes"].copy()
    codes[2, 5] ^= 1
    changed = form.unpack(packed | {"codes": codes}, 64) != whole
    assert changed.sum() == 1
    assert changed[2].any()


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**32 - 1))
@example(1, 1, 0)
def test_nibbles_come_back(rows, columns, seed):
    codes = np.random.default_rng(seed).integers(0, 16, (rows, columns), np.uint8)
    joined = join_nibbles(codes)
    assert joined.shape == (rows, -(-columns // 2))
    np.testing.assert_array_equal(split_nibbles(joined, columns), codes)
    np.testing.assert_array_equal(joined & 15, codes[:, ::2])
    if columns % 2:
        assert (joined[:, -1] >> 4 == 0).all()


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
def test_temporaries_stay_small(form):
    """Beside arrays and weights, packing and unpacking hold a few blocks, whatever the matrix."""
    weight = np.random.default_rng(0).standard_normal((4096, 2048), np.float32)
    tracemalloc.start()
    try:
        packed = form.pack(weight)
        pack_peak = tracemalloc.get_traced_memory()[1] - form.nbytes(*weight.shape)
        tracemalloc.reset_peak()
        kept = tracemalloc.get_traced_memory()[0]
        form.unpack(packed, 2048)
        unpack_peak = tracemalloc.get_traced_memory()[1] - kept - weight.nbytes
    finally:
        tracemalloc.stop()
    assert pack_peak < 8 << 20
    assert unpack_peak < 8 << 20


def test_contradictory_fields_are_refused():
    with pytest.raises(ValueError, match="absmax"):
        replace(LLM_INT8, zero="minimum")
    with pytest.raises(ValueError, match="absmax"):
        replace(LLM_INT8, bits=4)
    with pytest.raises(ValueError, match="divide 256"):
        replace(INT8, scales="u8*f16", group_size=48)
    with pytest.raises(ValueError, match="f9z7 scales hold a minimum"):
        replace(INT8, scales="f9z7")
    with pytest.raises(ValueError, match="makes f9z7 scales, not f16"):
        replace(INT4, scales="f16")
    with pytest.raises(ValueError, match="no format has scales 'f9z7'"):
        replace(NF4, scales="f9z7")
    with pytest.raises(ValueError, match="no rule"):
        replace(INT8, zero="integer")
