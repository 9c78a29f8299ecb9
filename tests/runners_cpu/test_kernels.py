"""Single kernels of each instruction set against numpy."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.models.parameters import Parameter
from octavo.quant.affine import INT8, LLM_INT8, Q4_1, Q8_0, Affine
from octavo.quant.format import Bundle, Format
from octavo.quant.nibbles import split_nibbles
from octavo.quant.plain import Plain
from octavo.runners.cpu import library
from octavo.runners.cpu.layout import CpuLayout, encoding_of
from octavo.runners.cpu.library import ISA_NAMES, Activation, IsaName

# Stored types that formats to come will have: every codec, and groups of 16 to 128 columns.
FORMATS: tuple[Format, ...] = (
    INT8,
    LLM_INT8,
    Q8_0,
    Q4_1,
    Affine("8-group-16", 8, 16, "none", "f32", "step", "stored-scale"),
    Affine("8-minimum", 8, 32, "minimum", "f16", "step", "stored-scale"),
    Affine("8-wide-minimum", 8, 128, "minimum", "f32", "step", "stored-scale"),
    Affine("4-group-16", 4, 16, "minimum", "f16", "step", "stored-scale"),
    Affine("4-group-64", 4, 64, "minimum", "f16", "step", "stored-scale"),
    Affine("4-wide", 4, 128, "minimum", "f32", "step", "stored-scale"),
    Affine("4-rows", 4, None, "minimum", "f32", "step", "stored-scale"),
    Plain("f32"),
    Plain("f16"),
    Plain("bf16"),
)


def random_arrays(chosen: Format, rows: int, columns: int, seed: int) -> dict[str, np.ndarray]:
    """A matrix in its format, extreme codes included."""
    source = np.random.default_rng(seed)
    if isinstance(chosen, Plain):
        return chosen.pack(source.normal(0, 0.5, (rows, columns)).astype(np.float32))
    assert isinstance(chosen, Affine)
    if chosen.bits == 8:
        codes = source.integers(-128, 128, (rows, columns)).astype(np.int8)
    else:
        codes = source.integers(0, 256, (rows, (columns + 1) // 2)).astype(np.uint8)
    scales = source.normal(0, 0.01, (rows, chosen.groups(columns)))
    arrays = {"codes": codes, "scales": scales, "minimums": scales * -source.uniform(0, 9, scales.shape)}
    dtype = np.float16 if chosen.scales == "f16" else np.float32
    return {
        name: array if name == "codes" else array.astype(dtype)
        for name, array in arrays.items()
        if name != "minimums" or chosen.zero == "minimum"
    }


class Packed:
    """A matrix in an instruction set's layout, as the library takes it."""

    def __init__(
        self, isa: IsaName, chosen: Format, shape: tuple[int, int], seed: int, bias: np.ndarray | None = None
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
        self.struct = library.Matrix(
            blocks=self.blocks.ctypes.data,
            bias=None if bias is None else bias.ctypes.data,
            block_bytes=encoding.block_bytes,
            rows=rows,
            columns=columns,
            codec=encoding.codec,
            group=encoding.group,
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
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    # int16 activations: each is off by at most its block's largest value / 65534.
    bound = np.abs(matrix.weight).sum(-1) * (np.abs(x).max() / 65534 + 1e-6) + 1e-5 * (1 + np.abs(want).max())
    assert (np.abs(got - want) <= bound).all()
    # The same row alone and in every tile size: the same bits.
    for row in range(tokens):
        assert matrix.times(x[row : row + 1]).tobytes() == got[row].tobytes()


@pytest.mark.parametrize("chosen", [f for f in FORMATS if f is not LLM_INT8], ids=lambda chosen: chosen.name)
def test_rows_are_dequantized_exactly(isa: IsaName, chosen: Format) -> None:
    matrix = Packed(isa, chosen, (37, 101), 3)
    for row in range(37):
        assert matrix.row(row).tobytes() == matrix.weight[row].tobytes()


def test_absmax_rows_are_dequantized_within_a_rounding(isa: IsaName) -> None:
    """Their scale is folded: code * (scale / 127) instead of (code * scale) / 127."""
    matrix = Packed(isa, LLM_INT8, (37, 101), 3)
    for row in range(37):
        np.testing.assert_allclose(matrix.row(row), matrix.weight[row], rtol=2e-7)


@pytest.mark.parametrize("scales", ["f16", "f32"])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_symmetric_nibbles(isa: IsaName, scales: Literal["f16", "f32"], group: int) -> None:
    """weight = (code - 8) * scale: blocks with minimums, the minimums cut out."""
    chosen = Affine("4", 4, group, "minimum", scales, "step", "stored-scale")
    rows, columns = 43, 200
    lanes = library.native().octavo_isa_lanes(ISA_NAMES.index(isa))
    logical = random_arrays(chosen, rows, columns, group)
    parameter = Parameter("layers.0.mixer.o.weight", (rows, columns), "matrix", "o")
    blocks = CpuLayout(lanes).arrange(Bundle("layers.0.o", (parameter,)), [(chosen, logical)])["o"]
    encoding = encoding_of(chosen, columns, lanes)
    assert encoding is not None
    table = encoding.groups * lanes * (2 if scales == "f16" else 4)
    header = -(-table // 64) * 64
    shorter = np.zeros((len(blocks), header + encoding.block_bytes - encoding.header_bytes), np.uint8)
    shorter[:, :table] = blocks[:, :table]
    shorter[:, header:] = blocks[:, encoding.header_bytes :]
    struct = library.Matrix(
        blocks=shorter.ctypes.data,
        block_bytes=shorter.shape[1],
        rows=rows,
        columns=columns,
        codec=library.Codec.U4_F16 if scales == "f16" else library.Codec.U4_F32,
        group=group,
    )
    x = np.random.default_rng(1).normal(0, 1, (5, columns)).astype(np.float32)
    out = np.full((5, rows), np.nan, np.float32)
    library.native().octavo_test_linear(
        ISA_NAMES.index(isa), ctypes.byref(struct), x.ctypes.data, 5, out.ctypes.data
    )
    codes = split_nibbles(logical["codes"], columns).astype(np.float32) - 8
    weight = codes * np.repeat(logical["scales"].astype(np.float32), group, axis=1)[:, :columns]
    np.testing.assert_allclose(out, x @ weight.T, atol=2e-3)
    row = np.full(columns, np.nan, np.float32)
    library.native().octavo_test_row(ISA_NAMES.index(isa), ctypes.byref(struct), 20, row.ctypes.data)
    assert (row == weight[20]).all()


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
