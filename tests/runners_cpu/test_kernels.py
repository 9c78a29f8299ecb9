"""Single kernels of each instruction set against numpy."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.models.parameters import Parameter
from octavo.quant.affine import (
    INT4,
    INT8,
    LLM_INT8,
    Q2_K,
    Q3_K,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    Affine,
)
from octavo.quant.codebook import IQ4_NL, IQ4_XS, NF4, Codebook
from octavo.quant.format import Bundle, Format
from octavo.quant.plain import Plain
from octavo.quant.scales import JOINT, SCALE_DTYPES, SUPER_COLUMNS
from octavo.quant.tables import TABLES
from octavo.runners.cpu import library
from octavo.runners.cpu.layout import CpuLayout, encoding_of
from octavo.runners.cpu.library import ISA_NAMES, Activation, IsaName
from octavo.runners.cpu.model import native_table

FORMATS: tuple[Format, ...] = (
    *(INT8, LLM_INT8, INT4, NF4, Q4_0, Q4_1, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS),
    # What quantized checkpoints hold: groups of other sizes, integer zeros, float32 numbers, two levels of both kinds.
    Affine("8-group-16", 8, 16, "none", "f32", "step", None),
    Affine("8-minimum", 8, 32, "minimum", "f16", "step", None),
    Affine("8-wide-minimum", 8, 128, "minimum", "f32", "step", None),
    Affine("8-zeros", 8, 64, "integer", "f16", "step", None),
    Affine("8-unsigned-scales", 8, 32, "none", "u8*f16", "step", None),
    Affine("4-group-16", 4, 16, "minimum", "f16", "step", None),
    Affine("4-symmetric-64", 4, 64, "none", "f16", "step", None),
    Affine("4-symmetric-wide", 4, 128, "none", "f32", "step", None),
    Affine("4-minimum-128", 4, 128, "minimum", "f16", "step", None),
    Affine("4-zeros-128", 4, 128, "integer", "f16", "step", None),
    Affine("4-signed-minimums", 4, 32, "minimum", "i8*f16", "step", None),
    Affine("4-rows", 4, None, "minimum", "f32", "step", None),
    Codebook("fp4-half", "fp4", 64, "f16", None),
    Codebook("nf4-rows", "nf4", None, "f32", None),
    Plain("f32"),
    Plain("f16"),
    Plain("bf16"),
)


def random_arrays(chosen: Format, rows: int, columns: int, seed: int) -> dict[str, np.ndarray]:
    """A matrix in its format, extreme codes included."""
    source = np.random.default_rng(seed)
    if isinstance(chosen, Plain):
        return chosen.pack(source.normal(0, 0.5, (rows, columns)).astype(np.float32))
    assert isinstance(chosen, Affine | Codebook)
    groups, dtype = chosen.groups(columns), SCALE_DTYPES[chosen.scales]
    if chosen.bits == 8:
        codes = source.integers(-128, 128, (rows, columns)).astype(np.int8)
    else:
        codes = source.integers(0, 256, (rows, (columns + 1) // 2)).astype(np.uint8)
    if chosen.scales == JOINT:
        # every zero, and scales of 2**-9 to 2**-4
        words = source.integers(0, 128, (rows, groups)) << 9 | source.integers(
            13 * 16, 18 * 16, (rows, groups)
        )
        return {"codes": codes, "scales": words.astype(dtype)}
    has_minimums = isinstance(chosen, Affine) and chosen.zero == "minimum"
    arrays = {"codes": codes}
    for name in ("scales", "minimums") if has_minimums else ("scales",):
        if dtype.itemsize > 1:
            sizes = source.normal(0, 0.01 if name == "scales" else 0.08, (rows, groups))
            arrays[name] = sizes.astype(dtype)
            continue
        limits = np.iinfo(dtype)
        arrays[name] = source.integers(limits.min, limits.max + 1, (rows, groups)).astype(dtype)
        shared = source.normal(0, 2e-4, (rows, -(-columns // SUPER_COLUMNS)))
        arrays[f"super_{name}"] = shared.astype(np.float16)
    if isinstance(chosen, Affine) and chosen.zero == "integer":
        arrays["zeros"] = source.integers(0, 16, (rows, groups)).astype(np.int8)
    return arrays


class Packed:
    """A matrix in an instruction set's layout, as the library takes it."""

    def __init__(
        self,
        isa: IsaName,
        chosen: Format,
        shape: tuple[int, int],
        seed: int,
        bias: np.ndarray | None = None,
        int8_activations: bool = False,
    ) -> None:
        self.isa = ISA_NAMES.index(isa)
        rows, columns = shape
        lanes = library.native().octavo_isa_lanes(self.isa)
        parameter = Parameter("layers.0.mixer.o.weight", shape, "matrix", "o")
        logical = random_arrays(chosen, rows, columns, seed)
        self.weight = chosen.unpack(logical, columns)
        arrays = CpuLayout(lanes).arrange(Bundle("layers.0.o", (parameter,)), [(chosen, logical)])
        self.blocks, self.bias = arrays["o"], bias
        encoding = encoding_of(chosen, columns, lanes)
        assert encoding is not None
        self.table = native_table(chosen.values) if isinstance(chosen, Codebook) else None
        self.struct = library.Matrix(
            blocks=self.blocks.ctypes.data,
            bias=None if bias is None else bias.ctypes.data,
            table=None if self.table is None else ctypes.pointer(self.table),
            block_bytes=encoding.block_bytes,
            rows=rows,
            columns=columns,
            codec=encoding.codec,
            numbers=encoding.numbers,
            group=encoding.group,
            int8_activations=int8_activations,
        )
        self.takes_int8 = encoding.takes_int8
        self.largest_scale = (
            np.abs(chosen.flat_scales(logical)).max() if isinstance(chosen, Codebook) else 0.0
        )

    def times(self, x: np.ndarray) -> np.ndarray:
        """fp32 [T, K] -> fp32 [T, N]."""
        out = np.full((len(x), self.struct.rows), np.nan, np.float32)
        x = np.ascontiguousarray(x, np.float32)
        status = library.native().octavo_test_linear(
            self.isa, ctypes.byref(self.struct), x.ctypes.data, len(x), out.ctypes.data
        )
        assert status == 0
        return out

    def row(self, index: int) -> np.ndarray:
        out = np.full(self.struct.columns, np.nan, np.float32)
        library.native().octavo_test_row(self.isa, ctypes.byref(self.struct), index, out.ctypes.data)
        return out


@pytest.mark.parametrize("chosen", FORMATS, ids=lambda chosen: chosen.name)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 70), st.sampled_from([1, 7, 32, 64, 72, 101, 160, 300, 576])),
    tokens=st.integers(1, 30),
    biased=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_linear(
    isa: IsaName, chosen: Format, shape: tuple[int, int], tokens: int, biased: bool, seed: int
) -> None:
    source = np.random.default_rng(seed)
    bias = source.normal(0, 1, shape[0]).astype(np.float32) if biased else None
    matrix = Packed(isa, chosen, shape, seed, bias)
    x = source.normal(0, 1, (tokens, shape[1])).astype(np.float32)
    x[:, source.integers(0, shape[1])] *= 50  # an outlier column, as models have
    want = x.astype(np.float64) @ matrix.weight.T.astype(np.float64) + (0 if bias is None else bias)
    got = matrix.times(x)
    assert (np.abs(got - want) <= bound(matrix, x, want, 65534)).all()
    # The same row alone and in every tile size: the same bits.
    for row in range(tokens):
        assert matrix.times(x[row : row + 1]).tobytes() == got[row].tobytes()


def bound(matrix: Packed, x: np.ndarray, want: np.ndarray, steps: int) -> np.ndarray:
    """Each activation is off by at most its block's largest value / `steps`, each entry of a table by half a step."""
    error = np.abs(matrix.weight).sum(-1) * (np.abs(x).max() / steps + 1e-6) + 1e-5 * (1 + np.abs(want).max())
    if matrix.table is None:
        return error
    table = matrix.table
    off = max(abs(step * table.step - value) for step, value in zip(table.steps, table.values, strict=True))
    return error + np.abs(x).sum(-1, keepdims=True) * matrix.largest_scale * off


def test_tables() -> None:
    """fp4 and iq4 are whole multiples of a step; nf4 is off by less than an 8,000th of its largest entry."""
    for name, limit in (("iq4", 1e-5), ("fp4", 1e-7), ("nf4", 1.3e-4)):
        values = TABLES[name]
        table = native_table(values)
        assert max(map(abs, table.steps)) <= 2047
        assert np.abs(np.array(table.steps) * table.step - values).max() < limit


@pytest.mark.parametrize("chosen", [INT8, LLM_INT8, Q8_0, Q5_1, Q5_K], ids=lambda chosen: chosen.name)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 70), st.sampled_from([1, 7, 32, 64, 72, 101, 160, 300, 576])),
    tokens=st.integers(1, 30),
    seed=st.integers(0, 2**32),
)
def test_int8_activations(
    isa: IsaName, chosen: Format, shape: tuple[int, int], tokens: int, seed: int
) -> None:
    matrix = Packed(isa, chosen, shape, seed, int8_activations=True)
    assert matrix.takes_int8
    x = np.random.default_rng(seed).normal(0, 1, (tokens, shape[1])).astype(np.float32)
    want = x.astype(np.float64) @ matrix.weight.T.astype(np.float64)
    got = matrix.times(x)
    assert (np.abs(got - want) <= bound(matrix, x, want, 254)).all()
    for row in range(tokens):
        assert matrix.times(x[row : row + 1]).tobytes() == got[row].tobytes()


def test_int8_activations_are_exact_where_they_are_whole(isa: IsaName) -> None:
    """Codes and activations at their extremes: products of -128 and 127 neither saturate nor overflow."""
    matrix = Packed(isa, INT8, (40, 128), 1, int8_activations=True)
    for sign in (1, -1):
        x = np.full((13, 128), 127.0 * sign, np.float32)
        want = x.astype(np.float64) @ matrix.weight.T.astype(np.float64)
        np.testing.assert_allclose(matrix.times(x), want, rtol=1e-5, atol=1e-4)


# Whose rule rounds twice: absmax times a 127th, and a zero subtracted before the scale.
_ROUNDED_TWICE = {"llm-int8", "8-zeros", "4-zeros-128"}


@pytest.mark.parametrize(
    "chosen", [f for f in FORMATS if f.name not in _ROUNDED_TWICE], ids=lambda chosen: chosen.name
)
def test_rows_are_dequantized_exactly(isa: IsaName, chosen: Format) -> None:
    matrix = Packed(isa, chosen, (37, 101), 3)
    for row in range(37):
        assert matrix.row(row).tobytes() == matrix.weight[row].tobytes()


def test_absmax_rows_are_dequantized_within_a_rounding(isa: IsaName) -> None:
    """Their scale is folded: code * (scale / 127) instead of (code * scale) / 127."""
    matrix = Packed(isa, LLM_INT8, (37, 101), 3)
    for row in range(37):
        np.testing.assert_allclose(matrix.row(row), matrix.weight[row], rtol=2e-7)


@pytest.mark.parametrize("chosen", [INT8, Q4_1, Plain("bf16")], ids=lambda chosen: chosen.name)
def test_a_row_that_is_not_finite_reaches_no_other(isa: IsaName, chosen: Format) -> None:
    matrix = Packed(isa, chosen, (24, 128), 1)
    x = np.random.default_rng(2).normal(0, 1, (13, 128)).astype(np.float32)
    want = matrix.times(x)
    for value in (np.nan, np.inf, -np.inf):
        broken = x.copy()
        broken[5, 77] = value
        got = matrix.times(broken)
        assert not np.isfinite(got[5]).any()
        assert np.delete(got, 5, 0).tobytes() == np.delete(want, 5, 0).tobytes()


def erf(x: np.ndarray) -> np.ndarray:
    return np.array([math.erf(v) for v in x])


@pytest.mark.parametrize(
    ("activation", "law"),
    [
        (Activation.SILU, lambda x: x / (1 + np.exp(-x))),
        (Activation.GELU, lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2)))),
        (
            Activation.GELU_TANH,
            lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        ),
    ],
)
def test_activation(isa: IsaName, activation: Activation, law: Callable[[Any], Any]) -> None:
    x = np.concatenate([np.linspace(-40, 40, 1003), np.linspace(-1, 1, 500)]).astype(np.float32)
    out = x.copy()
    library.native().octavo_test_activate(ISA_NAMES.index(isa), out.ctypes.data, len(x), activation)
    want = law(x.astype(np.float64))
    np.testing.assert_allclose(out, want, rtol=1e-6, atol=4e-7)
    faults = np.array([np.nan] * 9, np.float32)
    library.native().octavo_test_activate(ISA_NAMES.index(isa), faults.ctypes.data, len(faults), activation)
    assert np.isnan(faults).all()
