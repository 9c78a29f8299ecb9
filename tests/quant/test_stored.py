"""Checkpoints' own types: taken apart and put together exactly as the gguf package reads them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import IncompatibleModelError, InvalidParameterError, ModelFormatError
from octavo.quant import format_from_manifest, format_named, split_stored, stored_format
from octavo.quant.affine import INT8, LLM_INT8, Q4_1, Q8_0, Affine
from octavo.quant.codebook import NF4
from octavo.quant.nibbles import split_nibbles
from octavo.quant.plain import Plain

HALVES = {
    "q4_0": [0],
    "q4_1": [0, 2],
    "q5_0": [0],
    "q5_1": [0, 2],
    "q8_0": [0],
    "q2_k": [80, 82],
    "q3_k": [108],
    "q4_k": [0, 2],
    "q5_k": [0, 2],
    "q6_k": [208],
    "iq4_nl": [0],
    "iq4_xs": [0],
}
"""Where the float16 numbers of a block stand, in bytes; the other bytes may be anything."""
TYPES = {name: gguf.GGMLQuantizationType[name.upper()] for name in HALVES}
ALL = [Plain("f32"), Plain("f16"), Plain("bf16"), INT8, LLM_INT8, NF4, *map(stored_format, TYPES)]


def finite_halves(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """float16 of every exponent but infinity's, as bytes."""
    bits = random.integers(0, 2**16, shape, np.uint16)
    bits[(bits & 0x7C00) == 0x7C00] ^= 0x4000
    return bits.view(np.float16)


def columns_of(dtype: str, blocks: int) -> int:
    return blocks * gguf.GGML_QUANT_SIZES[TYPES[dtype]][0]


def random_rows(dtype: str, rows: int, blocks: int, seed: int) -> np.ndarray:
    """Any bytes at all but scales that are not finite: more than a quantizer would ever write."""
    random = np.random.default_rng(seed)
    raw = random.integers(0, 256, (rows, blocks, gguf.GGML_QUANT_SIZES[TYPES[dtype]][1]), np.uint8)
    for start in HALVES[dtype]:
        raw[..., start : start + 2] = finite_halves(random, (rows, blocks, 1)).view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("dtype", TYPES)
@settings(deadline=None)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_any_stored_rows_unpack_as_gguf(dtype, rows, blocks, seed):
    raw, columns = random_rows(dtype, rows, blocks, seed), columns_of(dtype, blocks)
    expected = dequantize(raw, TYPES[dtype])
    form = stored_format(dtype)
    assert form is not None
    assert form.name == dtype
    packed = split_stored(dtype, raw, columns)
    assert sum(array.nbytes for array in packed.values()) == form.nbytes(rows, columns)
    np.testing.assert_array_equal(form.unpack(packed, columns).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("dtype", [name for name in TYPES if isinstance(stored_format(name), Affine)])
def test_flat_numbers_make_the_same_weights(dtype):
    """A runner may compute code * scale + minimum with float32 numbers a group, whatever is stored."""
    raw, columns = random_rows(dtype, 40, 3, 0), columns_of(dtype, 3)
    form = stored_format(dtype)
    assert isinstance(form, Affine)
    assert form.group_size is not None
    packed = split_stored(dtype, raw, columns)
    codes = split_nibbles(packed["codes"], columns) if form.bits == 4 else packed["codes"]
    weight = codes * np.repeat(form.flat_scales(packed), form.group_size, axis=1)
    minimums = form.flat_minimums(packed)
    if minimums is not None:
        weight += np.repeat(minimums, form.group_size, axis=1)
    np.testing.assert_array_equal(weight, form.unpack(packed, columns))


@pytest.mark.parametrize("dtype", TYPES)
def test_blocks_of_many_rows(dtype):
    """More rows than one block of the splitter."""
    raw, columns = random_rows(dtype, 4500, 2, 0), columns_of(dtype, 2)
    form = stored_format(dtype)
    assert form is not None
    np.testing.assert_array_equal(
        form.unpack(split_stored(dtype, raw, columns), columns), dequantize(raw, TYPES[dtype])
    )


@pytest.mark.parametrize(("dtype", "form"), [("q8_0", Q8_0), ("q4_1", Q4_1)])
@settings(deadline=None)
@given(
    rows=st.integers(1, 5),
    blocks=st.integers(1, 5),
    scale=st.integers(-20, 10),
    seed=st.integers(0, 2**32 - 1),
)
def test_packing_is_gguf_own(dtype, form: Affine, rows, blocks, scale, seed):
    random = np.random.default_rng(seed)
    weight = (random.standard_normal((rows, 32 * blocks)) * 2.0**scale).astype(np.float32)
    weight[random.random((rows, 32 * blocks)) < 0.2] = 0
    weight[0, :32] = 0
    theirs = split_stored(dtype, quantize(weight, TYPES[dtype]), 32 * blocks)
    ours = form.pack(weight)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])


def test_q8_0_rounds_halves_away_from_zero():
    """ggml's roundf, and not 0.49999997 up, which adding 0.5 first would do."""
    weight = np.full((1, 32), 127, np.float32)
    weight[0, :5] = [0.5, -0.5, 2.5, 0.49999997, -0.49999997]
    np.testing.assert_array_equal(Q8_0.pack(weight)["codes"][0, :5], [1, -1, 3, 0, 0])


@pytest.mark.parametrize("dtype", TYPES)
def test_damaged_rows_are_refused(dtype):
    raw, columns = random_rows(dtype, 2, 2, 0), columns_of(dtype, 2)
    changed = (
        (raw, columns // 2),
        (raw, columns + 1),
        (raw[:, :-1], columns),
        (raw.astype(np.int8), columns),
    )
    for rows, width in changed:
        with pytest.raises(ModelFormatError, match=f"in blocks of {columns // 2}"):
            split_stored(dtype, rows, width)
    for start in HALVES[dtype]:
        broken = raw.copy()
        broken[1, start : start + 2] = np.array([np.inf], np.float16).view(np.uint8)
        with pytest.raises(ModelFormatError, match="not numbers"):
            split_stored(dtype, broken, columns)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_plain_values_come_as_they_are(dtype):
    form = stored_format(dtype)
    assert form == Plain(dtype)
    values = form.pack(np.arange(6, dtype=np.float32).reshape(2, 3))["values"]
    assert split_stored(dtype, values, 3)["values"] is values
    with pytest.raises(ModelFormatError, match="came as"):
        split_stored(dtype, values, 4)
    with pytest.raises(ModelFormatError, match="came as float64"):
        split_stored(dtype, values.astype(np.float64), 3)
    infinite = values.copy()
    infinite[0, 0] = 0x7F80 if dtype == "bf16" else np.inf
    with pytest.raises(ModelFormatError, match="not numbers"):
        split_stored(dtype, infinite, 3)


@pytest.mark.parametrize("dtype", ["iq2_xxs", "i8", "f8_e4m3", "f64"])
def test_types_we_cannot_read_are_named(dtype):
    assert stored_format(dtype) is None
    with pytest.raises(IncompatibleModelError, match=dtype) as raised:
        split_stored(dtype, np.zeros((1, 144), np.uint8), 256)
    assert "q8_0" in raised.value.remedy


@pytest.mark.parametrize("form", ALL, ids=lambda f: f.name)
def test_manifests_come_back(form):
    assert format_from_manifest(form.to_manifest()) == form
    for key in form.to_manifest().keys() - {"name"}:
        with pytest.raises(ModelFormatError, match="unknown weight format"):
            format_from_manifest(form.to_manifest() | {key: "other"})
    with pytest.raises(ModelFormatError):
        format_from_manifest({})


def test_names_a_user_gives():
    assert format_named("int8") is INT8
    assert format_named("llm-int8") is LLM_INT8
    assert format_named("nf4") is NF4
    for name in ("auto", "none", "int9", ""):
        with pytest.raises(InvalidParameterError) as raised:
            format_named(name)
        assert raised.value.parameter == "quant"
