"""The packed layouts: a partition of the parameters, exact for any shape, and what memory a plan is told."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.models.parameters import Parameter
from octavo.models.spec import ModelSpec
from octavo.quant.affine import INT4, INT8, Q4_1, Q8_0, Affine
from octavo.quant.codebook import NF4, Codebook
from octavo.quant.format import Bundle, Format
from octavo.quant.plain import Plain
from octavo.runners.bundles import ALIGNMENT_BYTES
from octavo.runners.cpu import library
from octavo.runners.cpu.layout import CpuLayout, encoding_of
from octavo.runners.cpu.library import ISA_NAMES, IsaName
from octavo.runners.cpu.model import native_table

FORMATS: tuple[Format, ...] = (INT4, INT8, Q8_0, Q4_1, NF4, Plain("f32"), Plain("f16"), Plain("bf16"))


@pytest.mark.parametrize("chosen", FORMATS, ids=lambda chosen: chosen.name)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 40), columns=st.integers(1, 200), seed=st.integers(0, 2**32))
def test_every_row_survives(isa: IsaName, chosen: Format, rows: int, columns: int, seed: int) -> None:
    """arrange, then the library's own reader, gives back what the format says the weights are."""
    if chosen in (Q8_0, Q4_1):
        columns = -(-columns // 32) * 32
    number = ISA_NAMES.index(isa)
    lanes = library.native().octavo_isa_lanes(number)
    weight = np.random.default_rng(seed).normal(0, 2, (rows, columns)).astype(np.float32)
    logical = chosen.pack(weight)
    parameter = Parameter("layers.7.ffn.down.weight", (rows, columns), "matrix", "down")
    blocks = CpuLayout(lanes).arrange(Bundle("layers.7.down", (parameter,)), [(chosen, logical)])["down"]
    encoding = encoding_of(chosen, columns, lanes)
    assert encoding is not None
    assert blocks.nbytes == encoding.nbytes(rows)
    assert encoding.block_bytes % ALIGNMENT_BYTES == 0
    assert encoding.header_bytes % ALIGNMENT_BYTES == 0
    table = native_table(chosen.values) if isinstance(chosen, Codebook) else None
    matrix = library.Matrix(
        blocks=blocks.ctypes.data,
        table=None if table is None else ctypes.pointer(table),
        block_bytes=encoding.block_bytes,
        rows=rows,
        columns=columns,
        codec=encoding.codec,
        numbers=encoding.numbers,
        group=encoding.group,
    )
    out = np.full(columns, np.nan, np.float32)
    want = chosen.unpack(logical, columns)
    for row in range(rows):
        library.native().octavo_test_row(number, ctypes.byref(matrix), row, out.ctypes.data)
        assert out.tobytes() == want[row].tobytes()


@pytest.mark.parametrize("lanes", [8, 16])
def test_bundles_partition_the_parameters(lanes: int, spec: ModelSpec, tiny: Callable[..., Any]) -> None:
    made = tiny(spec)
    bundles = CpuLayout(lanes).bundles(made.parameters)
    listed = [parameter for bundle in bundles for parameter in bundle.parameters]
    assert sorted(p.name for p in listed) == sorted(p.name for p in made.parameters)
    assert len({bundle.name for bundle in bundles}) == len(bundles)
    for bundle in bundles:
        arrays = CpuLayout(lanes).arrange(
            bundle,
            [
                (made.formats[p.name], made.formats[p.name].pack(made.tensors[p.source].values))
                for p in bundle.parameters
            ],
        )
        assert all("." not in name and a.flags.c_contiguous for name, a in arrays.items())
        assert all(a.nbytes % ALIGNMENT_BYTES == 0 for a in arrays.values())


def test_formats_without_kernels() -> None:
    odd_group = Affine("odd", 8, 24, "none", "f16", "step", "stored-scale")
    assert encoding_of(odd_group, 96, 8) is None
    assert encoding_of(INT8, 96, 8) is not None


def test_gate_and_up_of_two_formats(
    isa: Any, models: Any, tiny: Callable[..., Any], drive: Callable[..., Any], tokens: Callable[..., Any]
) -> None:
    """Files mix types: parts of a bundle may differ, also in how they want their input encoded."""
    spec = models(96, 160)
    made = tiny(spec)
    mixed: dict[str, Format] = dict(made.formats)
    for layer in range(len(spec.layers)):
        mixed[f"layers.{layer}.ffn.up.weight"] = Q4_1
        mixed[f"layers.{layer}.mixer.v.weight"] = Plain("bf16")
        mixed[f"layers.{layer}.mixer.k.weight"] = Q8_0
    changed = type(made)(spec, made.parameters, made.tensors, mixed)
    ids = tokens(50)
    theirs, ours = drive(spec, changed.reference()), drive(spec, changed.native(isa, threads=2))
    ours.open(0, ids)
    got = ours.logits(ours.chunk(0, 0, ids))[0]
    want = theirs.reference_logits(0, ids)[-1]
    assert np.abs(want - got).max() < 2e-2 * want.std()


def test_memory_stays_within_the_plan(
    isa: Any, spec: ModelSpec, tiny: Callable[..., Any], drive: Any
) -> None:
    from octavo.runners.cpu.limits import activation_bytes, kv_bytes

    made = tiny(spec)
    runner = made.native(isa, threads=2)
    driver = drive(spec, runner)
    ids = tuple(i % spec.vocab_size for i in range(300))
    driver.open(0, ids)
    driver.logits(driver.chunk(0, 0, ids, targets=(*ids[1:], -1)))
    driver.logits(driver.chunk(0, 300, None))
    held, config = runner.memory(), runner._config
    assert held["kv"] == kv_bytes(spec, config)
    assert held["activations"] <= activation_bytes(spec, config, 2)
