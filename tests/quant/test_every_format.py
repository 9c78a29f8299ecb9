"""Laws that every format a weight can be packed to obeys, for any shape and any finite weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from octavo.errors import ModelFormatError
from octavo.quant import format_from_manifest, format_named
from octavo.quant.affine import INT4, INT8, LLM_INT8, Q4_1, Q8_0
from octavo.quant.codebook import NF4
from octavo.quant.format import Format
from octavo.quant.plain import Plain
from octavo.settings import QuantName

FP4 = replace(NF4, name="fp4", table="fp4")

Bound = Callable[[np.ndarray], np.ndarray]


def of_groups(group: int, share: float, least: float = 0.0, *, span: bool = False) -> Bound:
    """The error allowed to a weight: a share of its group's largest magnitude (or of its span, 0 included)."""

    def bound(weight: np.ndarray) -> np.ndarray:
        columns = weight.shape[1]
        starts = np.arange(0, columns, group)
        high = np.maximum(np.maximum.reduceat(weight, starts, axis=1), 0)
        low = np.minimum(np.minimum.reduceat(weight, starts, axis=1), 0)
        sizes = (high - low) if span else np.maximum(high, -low)
        return np.repeat(sizes, group, axis=1)[:, :columns] * np.float64(share) + least

    return bound


FORMATS: dict[Format, Bound] = {
    Plain("f32"): lambda weight: np.zeros(weight.shape),
    Plain("f16"): lambda weight: np.abs(weight.astype(np.float64)) * 2**-11 + 2**-25,
    Plain("bf16"): lambda weight: np.abs(weight.astype(np.float64)) * 2**-8 + 2.0**-134,
    INT8: of_groups(64, 0.5 / 127 * 1.01, 2**-24),
    # Cast to float16 first; one scale a row.
    LLM_INT8: of_groups(1 << 20, 0.5 / 127 * 1.01 + 2**-11, 2**-24),
    Q8_0: of_groups(32, 0.5 / 127 + 2**-10, 2**-18),
    # Half a step, and what float16 loses of scale and minimum.
    Q4_1: of_groups(32, 0.5 / 15 + 2**-9, 2**-19, span=True),
    # The search may clip what it gains on the others.
    INT4: of_groups(32, 0.5, 2**-22, span=True),
    NF4: of_groups(64, 0.152 + 1e-6, 1e-38),
    FP4: of_groups(64, 0.1667 + 1e-6, 1e-38),
}
"""Every format with a packer, and the largest error of each weight."""


def test_every_name_a_user_gives_is_here():
    named = set(QuantName.__args__) - {"auto", "none"}
    assert {format_named(name) for name in named} <= set(FORMATS)


@st.composite
def weights(draw: st.DrawFn, multiple: int) -> np.ndarray:
    """[N, K]: magnitudes that differ by up to 2**24, zeros, one-sided groups and spikes among them."""
    rows = draw(st.integers(1, 4))
    columns = draw(st.integers(1, 600 // multiple)) * multiple
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    top = draw(st.integers(-14, 12))
    exponents = random.uniform(draw(st.integers(top - 24, top)), top, (rows, columns))
    signs = random.choice(draw(st.sampled_from([[-1.0, 1.0], [1.0], [-1.0]])), (rows, columns))
    weight = (signs * 2.0**exponents).astype(np.float32)
    weight[random.random((rows, columns)) < draw(st.sampled_from([0.0, 0.5, 0.99]))] = 0
    return weight


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_laws(form: Format, data: st.DataObject):
    """Bytes as announced, errors within the bound, rows independent, and the same again from what came out."""
    weight = data.draw(weights(32 if form.name.startswith("q") else 1))
    rows, columns = weight.shape
    packed = form.pack(weight)
    assert sum(array.nbytes for array in packed.values()) == form.nbytes(rows, columns)
    values = form.unpack(packed, columns)
    assert values.dtype == np.float32
    assert values.shape == weight.shape
    assert np.isfinite(values).all()
    assert (np.abs(values - weight.astype(np.float64)) <= FORMATS[form](weight)).all()
    np.testing.assert_array_equal(values[weight.any(axis=1) == 0], 0)
    order = np.array(data.draw(st.permutations(range(rows))))
    for chosen in (order, slice(1, rows), slice(0, 0)):
        taken = form.select_rows(packed, chosen)
        np.testing.assert_array_equal(form.unpack(taken, columns), values[chosen])
        for name, array in form.pack(weight[chosen]).items():
            assert array.dtype == taken[name].dtype
            np.testing.assert_array_equal(taken[name], array)


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
def test_the_bounds_can_fail(form: Format):
    """The control: one flipped bit of a code or value breaks the bound, the bytes or nothing else would."""
    weight = np.random.default_rng(0).uniform(0.5, 1, (3, 64)).astype(np.float32)
    weight[1] *= -1
    packed = form.pack(weight)
    name = "values" if isinstance(form, Plain) else "codes"
    bits = packed[name].copy().view(np.uint8)
    bits[1, bits.shape[1] - 1] ^= 0xC0
    values = form.unpack(packed | {name: bits.view(packed[name].dtype)}, 64)
    wrong = np.abs(values - weight.astype(np.float64)) > FORMATS[form](weight)
    assert wrong[1].any() or form is INT4
    assert (values != form.unpack(packed, 64)).sum() <= 2
    assert (values != form.unpack(packed, 64))[1].any()


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
@settings(deadline=None, max_examples=40)
@given(
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=32, max_size=32),
)
@example(bits=[0x7F7FFFFF] * 32)
@example(bits=[0x00000001] * 32)
@example(bits=[0xFF7FFFFF, 0x7F7FFFFF] * 16)
def test_any_bits_are_packed_or_refused(form: Format, bits: list[int]):
    """Not a warning, a wrong code or an infinity: extreme weights are packed, or refused by name."""
    weight = np.array(bits, np.uint32).view(np.float32)[None]
    try:
        packed = form.pack(weight)
    except ModelFormatError:
        return
    assert np.isfinite(weight).all()
    assert np.isfinite(form.unpack(packed, 32)).all()


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f.name)
def test_manifests_survive_json(form: Format):
    manifest = json.loads(json.dumps(form.to_manifest()))
    assert format_from_manifest(manifest) == form
