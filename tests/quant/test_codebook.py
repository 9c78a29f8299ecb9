"""nf4 and fp4 are bitsandbytes' own: codes, scales and weights equal bit for bit; and the tables' sources."""

from __future__ import annotations

from dataclasses import replace

import gguf.quants
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import ModelFormatError
from octavo.quant.codebook import NF4, Codebook
from octavo.quant.tables import TABLES

bitsandbytes = pytest.importorskip("bitsandbytes")
functional = bitsandbytes.functional

FP4 = replace(NF4, name="fp4", table="fp4")


def quantized(weight: np.ndarray, form: Codebook) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """bitsandbytes' codes [N, K], absmax [N, groups] and weights; K has to be a multiple of the block."""
    packed, state = functional.quantize_4bit(
        torch.from_numpy(weight), blocksize=form.group_size, quant_type=form.table
    )
    pairs = packed.numpy().reshape(-1)
    codes = np.stack((pairs >> 4, pairs & 15), axis=-1).reshape(weight.shape)
    weights = functional.dequantize_4bit(packed, state).numpy()
    return codes, state.absmax.numpy().reshape(len(weight), -1), weights


def codes_of(packed: dict[str, np.ndarray]) -> np.ndarray:
    return np.stack((packed["codes"] & 15, packed["codes"] >> 4), axis=-1).reshape(len(packed["codes"]), -1)


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("form", [NF4, FP4], ids=lambda f: f.name)
@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 5),
    blocks=st.integers(1, 4),
    scale=st.integers(-40, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_codes_scales_and_weights_are_bitsandbytes(form, block, rows, blocks, scale, seed):
    form = replace(form, group_size=block)
    random = np.random.default_rng(seed)
    columns = blocks * block
    weight = (random.standard_normal((rows, columns)) * 2.0**scale).astype(np.float32)
    weight[random.random(weight.shape) < 0.1] = 0
    weight[0, :block] = 0
    codes, scales, weights = quantized(weight, form)
    packed = form.pack(weight)
    np.testing.assert_array_equal(packed["scales"].view(np.uint32), scales.view(np.uint32))
    np.testing.assert_array_equal(codes_of(packed), codes)
    # Adding 0 makes -0 0: fp4's code 8 is 0 in bitsandbytes' table and -0 in its CPU kernel.
    np.testing.assert_array_equal(
        (form.unpack(packed, columns) + 0).view(np.uint32), (weights + 0).view(np.uint32)
    )


@pytest.mark.parametrize("form", [NF4, FP4], ids=lambda f: f.name)
def test_halfway_between_entries(form):
    """Every midpoint, and its neighbours on both sides."""
    entries = np.sort(TABLES[form.table])
    middle = (entries[:-1] + entries[1:]) / 2
    points = np.concatenate((entries, middle, np.nextafter(middle, -2), np.nextafter(middle, 2)))
    weight = np.zeros((1, 128), np.float32)
    weight[0, : len(points)] = points
    weight[0, [63, 127]] = 1
    codes, _, _ = quantized(weight, form)
    np.testing.assert_array_equal(codes_of(form.pack(weight)), codes)


@pytest.mark.parametrize("columns", [1, 63, 65, 100])
def test_rows_end_in_short_groups(columns):
    """No group spans two rows, whatever the width: not bitsandbytes' groups, but each one packed by its rule."""
    weight = np.random.default_rng(columns).standard_normal((5, columns)).astype(np.float32)
    packed = NF4.pack(weight)
    assert sum(array.nbytes for array in packed.values()) == NF4.nbytes(5, columns)
    whole = NF4.unpack(packed, columns)
    for first in range(0, columns, 64):
        padded = np.zeros((5, 64), np.float32)
        part = weight[:, first : first + 64]
        padded[:, : part.shape[1]] = part
        np.testing.assert_array_equal(
            whole[:, first : first + 64], quantized(padded, NF4)[2][:, : part.shape[1]]
        )


def test_float32_is_the_dequantizers_own_precision():
    """A checkpoint of 16 bits gets bitsandbytes' 16-bit weights when ours are rounded once."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float16, torch.bfloat16):
        packed, state = functional.quantize_4bit(weight.to(dtype), quant_type="nf4")
        theirs = functional.dequantize_4bit(packed, state)
        ours = NF4.unpack(NF4.pack(weight.to(dtype).float().numpy()), 256)
        assert theirs.dtype == dtype
        assert torch.equal(torch.from_numpy(ours).to(dtype), theirs)


def test_what_is_not_finite_is_refused():
    for bad in (np.nan, np.inf):
        with pytest.raises(ModelFormatError, match="infinite or not a number"):
            NF4.pack(np.array([[1, bad]], np.float32))


def test_tables():
    for name in ("nf4", "fp4"):
        theirs = functional.get_4bit_type(name, "cpu").numpy()
        np.testing.assert_array_equal(TABLES[name].view(np.uint32), theirs.view(np.uint32))
    np.testing.assert_array_equal(TABLES["iq4"], gguf.quants.IQ4_NL.kvalues)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(TABLES["e4m3"], every)
    assert all(not table.flags.writeable for table in TABLES.values())


def test_contradictory_fields_are_refused():
    with pytest.raises(ValueError, match="divide 256"):
        replace(NF4, scales="i8*f16", group_size=48)
    with pytest.raises(ValueError, match="table"):
        replace(NF4, table="nf5")
