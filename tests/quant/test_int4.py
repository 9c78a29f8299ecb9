"""int4: the search finds scales that no simple rule beats, and stores them as it says."""

from __future__ import annotations

import numpy as np
import pytest

from octavo.errors import ModelFormatError
from octavo.quant.affine import INT4, Q4_1


def squared_error(form, weight: np.ndarray) -> float:
    return float(np.square(form.unpack(form.pack(weight), weight.shape[1]) - weight).sum())


def one_sided(random: np.random.Generator) -> np.ndarray:
    return np.abs(random.standard_normal((64, 512))).astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "columns rescaled", "one-sided"])
def test_less_error_than_least_and_largest_at_fewer_bits(kind):
    random = np.random.default_rng(0)
    weight = random.standard_normal((64, 512)).astype(np.float32)
    if kind == "heavy tails":
        weight = random.standard_t(4, (64, 512)).astype(np.float32)
    elif kind == "columns rescaled":
        weight /= np.exp(random.uniform(np.log(0.7), np.log(1.4), 512)).astype(np.float32)
    elif kind == "one-sided":
        weight = one_sided(random)
    assert INT4.nbytes(64, 512) < Q4_1.nbytes(64, 512)
    # From 0 up a group's least weight is nearly the best minimum: there is less to win.
    share = 0.98 if kind == "one-sided" else 0.85
    assert squared_error(INT4, weight) < share * squared_error(Q4_1, weight)


def test_bits_a_weight():
    assert INT4.nbytes(1, 4096) * 8 / 4096 == 4.5


def test_a_grid_is_found_again():
    """Weights that already stand on 16 levels from their own least to their largest stay where they are."""
    random = np.random.default_rng(1)
    codes = random.integers(0, 16, (8, 8, 32))
    codes[..., 0], codes[..., 1] = 0, 15
    scales = random.integers(16, 32, (8, 8, 1)) / 2**12
    zeros = random.integers(0, 121, (8, 8, 1)) / 8
    weight = ((codes - zeros) * scales).astype(np.float32).reshape(8, 256)
    np.testing.assert_array_equal(INT4.unpack(INT4.pack(weight), 256), weight)


def test_every_word_means_what_the_page_says():
    """The scale and the zero of all 65,536 words, against the formula in plain floats; weights are exact."""
    words = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 1)
    packed = {"codes": np.full((1 << 16, 1), 0x0F, np.uint8), "scales": words}
    scales = np.array([2.0 ** ((w >> 4 & 31) - 22) * (1 + (w & 15) / 16) for w in range(512)])
    scales = scales[words[:, 0] & 511]
    np.testing.assert_array_equal(INT4.flat_scales(packed)[:, 0], scales)
    np.testing.assert_array_equal(INT4.unpack(packed, 2)[:, 0], scales * (15 - (words[:, 0] >> 9) / 8))


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_group_far_from_zero_keeps_its_mean(sign):
    """Its line would need a zero outside the codes: the best of those that can be stored is found all the same."""
    weight = sign * np.random.default_rng(4).uniform(9, 10, (8, 64)).astype(np.float32)
    error = INT4.unpack(INT4.pack(weight), 64) - weight
    assert np.abs(error).max() < 0.6
    assert abs(error.mean()) < 0.05


def test_codes_are_the_nearest_for_the_scales_as_stored():
    weight = np.random.default_rng(2).standard_normal((16, 256)).astype(np.float32)
    packed = INT4.pack(weight)
    error = np.abs(INT4.unpack(packed, 256) - weight)
    codes = np.stack((packed["codes"] & 15, packed["codes"] >> 4), axis=-1).reshape(16, 256)
    for step in (-1, 1):
        moved = np.clip(codes.astype(int) + step, 0, 15).astype(np.uint8)
        joined = moved[:, 0::2] | moved[:, 1::2] << 4
        other = np.abs(INT4.unpack(packed | {"codes": joined}, 256) - weight)
        assert (error <= other + 1e-6).all()


def test_groups_may_end_short():
    random = np.random.default_rng(3)
    for columns in (1, 31, 33, 255, 257, 577):
        weight = random.standard_normal((3, columns)).astype(np.float32)
        packed = INT4.pack(weight)
        assert packed["scales"].shape == (3, -(-columns // 32))
        error = np.square(INT4.unpack(packed, columns) - weight).mean()
        assert error < 0.01


def test_what_scales_cannot_hold_is_refused():
    with pytest.raises(ModelFormatError, match="14880"):
        INT4.pack(np.full((1, 32), 3e38, np.float32))
    with pytest.raises(ModelFormatError, match="infinite"):
        INT4.pack(np.full((1, 32), np.inf, np.float32))
