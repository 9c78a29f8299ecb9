"""Quantized checkpoints keep their numbers: weights equal to the library's own, bit for bit.

The files of tests/quant/checkpoints were written by AutoGPTQ, AutoAWQ and compressed-tensors (make.py there);
bitsandbytes and transformers write theirs here.
"""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from octavo.errors import IncompatibleModelError, ModelFormatError, UnsupportedConfigError
from octavo.models.parameters import Parameter
from octavo.packing import choose_formats, pack_parameter
from octavo.quant import format_from_manifest
from octavo.quant.affine import INT8, LLM_INT8, Affine
from octavo.quant.checkpoint import PackedTensor, open_quantized
from octavo.quant.codebook import NF4, Codebook
from octavo.quant.plain import Plain, from_bf16
from octavo.sources.files import MappedFile
from octavo.sources.safetensors import read_safetensors
from octavo.types import ModelSource, TensorRef

FILES = sorted((Path(__file__).parent / "checkpoints").glob("*.safetensors"))
assert len(FILES) == 15


@dataclass(frozen=True)
class ArrayTensor:
    """A TensorRef over values in memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def read(self) -> np.ndarray:
        return self.values


DTYPES = {
    torch.float8_e4m3fn: ("f8_e4m3", torch.uint8),
    torch.float8_e8m0fnu: ("f8_e8m0", torch.uint8),
    torch.bfloat16: ("bf16", torch.uint16),
    torch.float16: ("f16", None),
    torch.float32: ("f32", None),
    torch.int8: ("i8", None),
    torch.uint8: ("u8", None),
    torch.int32: ("i32", None),
    torch.int64: ("i64", None),
}


def refs(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorRef]:
    """As the safetensors reader would give them."""
    found: dict[str, TensorRef] = {}
    for name, tensor in tensors.items():
        dtype, bits = DTYPES[tensor.dtype]
        values = (
            tensor.detach().contiguous() if bits is None else tensor.detach().contiguous().view(bits)
        ).numpy()
        found[name] = ArrayTensor(name, dtype, tuple(tensor.shape), values)
    return found


def source_of(config: Mapping[str, Any], tensors: Mapping[str, TensorRef]) -> ModelSource:
    return ModelSource(
        location="checkpoint",
        revision=None,
        naming="huggingface",
        config={"quantization_config": config},
        generation_config={},
        tokenizer=None,
        chat_template=None,
        tensors=tensors,
        fingerprint="f" * 64,
    )


def fixture(path: Path) -> tuple[ModelSource, Mapping[str, TensorRef]]:
    """The checkpoint of a file, and the expected weights in it."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    config = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["quantization_config"])
    tensors = read_safetensors(MappedFile.open(path))
    expected = {name: tensor for name, tensor in tensors.items() if name.startswith("expected")}
    return source_of(config, {n: t for n, t in tensors.items() if n not in expected}), expected


def packed(source: ModelSource, name: str = "q.weight") -> PackedTensor:
    tensor = open_quantized(source).tensors[name]
    assert isinstance(tensor, PackedTensor)
    return tensor


def assert_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.shape == theirs.shape
    np.testing.assert_array_equal((ours + 0).view(np.uint32), (theirs + 0).view(np.uint32))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_weights_are_the_librarys_own(path: Path):
    source, expected = fixture(path)
    tensor = packed(source)
    assert tensor.shape == expected["expected.q"].shape
    ours = tensor.read()
    assert_bits(ours, expected["expected.q"].read())
    # What the library computes from 16-bit scales is ours, rounded once.
    theirs = expected["expected16.q"]
    if theirs.dtype == "f16":
        np.testing.assert_array_equal(ours.astype(np.float16), theirs.read())
    else:
        assert torch.equal(
            torch.from_numpy(ours).bfloat16().float(), torch.from_numpy(from_bf16(theirs.read()))
        )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_packing_keeps_the_arrays_and_their_rows(path: Path):
    source = open_quantized(fixture(path)[0])
    (tensor,) = (t for t in source.tensors.values() if isinstance(t, PackedTensor))
    rows, columns = tensor.shape
    whole = tensor.read()
    form = tensor.format
    assert source.quantized_as == (form.name,)
    assert format_from_manifest(form.to_manifest()) == form
    assert sum(array.nbytes for array in tensor.load().values()) == form.nbytes(rows, columns)
    fused = [
        Parameter(name, (last - first, columns), "matrix", "q.weight", (first, last))
        for name, first, last in (("q", 0, 8), ("k", 8, 24), ("v", 24, rows))
    ]
    for quant, chosen in (("auto", form), ("none", Plain("f32"))):
        assert choose_formats(fused, source.tensors, quant) == dict.fromkeys("qkv", chosen)
    for parameter in fused:
        assert parameter.rows is not None
        first, last = parameter.rows
        arrays = pack_parameter(parameter, source.tensors, form)
        assert_bits(form.unpack(arrays, columns), whole[first:last])
        for other in (INT8, Plain("f32")):
            again = pack_parameter(parameter, source.tensors, other)
            expected = other.pack(whole[first:last])
            for name, array in again.items():
                np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_flat_numbers_make_the_same_weights(path: Path):
    """code * scale + minimum, which runners compute, is the weight; exactly where scales have 16 bits."""
    tensor = packed(fixture(path)[0])
    form = tensor.format
    if not isinstance(form, Affine):
        return
    arrays = tensor.load()
    flat = Affine("flat", form.bits, form.group_size, "minimum", "f32", "step", None, form.ordered)
    minimums = form.flat_minimums(arrays)
    scales = form.flat_scales(arrays)
    same = {
        **{name: array for name, array in arrays.items() if name in ("codes", "order")},
        "scales": scales,
        "minimums": np.zeros_like(scales) if minimums is None else minimums,
    }
    np.testing.assert_array_equal(flat.unpack(same, tensor.shape[1]), tensor.read())


@pytest.mark.parametrize(
    "stem", ["gptq-4-sym", "awq-4", "compressed-w4a16-channel", "compressed-float8-block"]
)
def test_sizes_that_only_a_config_bounds_allocate_nothing(stem):
    """A group or block wider than the matrix is the matrix, not an array of its size."""
    source, _ = fixture(next(path for path in FILES if path.stem == stem))
    config, tensors = json.loads(json.dumps(source.config["quantization_config"])), dict(source.tensors)
    wide = (1 << 31) - 1
    if stem == "awq-4":
        tensors |= {
            name: ArrayTensor(
                name, tensors[name].dtype, (1, tensors[name].shape[1]), tensors[name].read()[:1]
            )
            for name in ("q.qzeros", "q.scales")
        }
    if stem.startswith("compressed"):
        scheme = config["config_groups"]["group_0"]["weights"]
        scheme |= {"strategy": "group", "group_size": wide}
        if "float8" in stem:
            scheme |= {"strategy": "block", "block_structure": [wide, wide]}
            name = "q.weight_scale"
            tensors[name] = ArrayTensor(name, "bf16", (1, 1), tensors[name].read()[:1, :1])
    else:
        config["group_size"] = wide
    tensor = packed(source_of(config, tensors))
    tracemalloc.start()
    try:
        tensor.read()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def test_a_count_of_zeros_changes_nothing():
    """What llm-compressor wrote beside every checkpoint at first."""
    source, expected = fixture(next(path for path in FILES if path.stem == "compressed-w4a16-g32"))
    dense = {"format": "dense", "global_sparsity": 0.14, "registry_requires_subclass": False}
    config = dict(source.config["quantization_config"]) | {"sparsity_config": dense}
    assert_bits(packed(source_of(config, source.tensors)).read(), expected["expected.q"].read())


def test_act_order_is_kept_as_an_order_of_columns():
    tensor = packed(fixture(next(path for path in FILES if path.stem == "gptq-4-act"))[0])
    assert isinstance(tensor.format, Affine)
    assert tensor.format.ordered
    order = tensor.load()["order"]
    assert sorted(order) == list(range(tensor.shape[1]))
    assert (np.diff(order) < 0).any()


def test_gptq_v2_stores_zeros_as_they_are():
    source, expected = fixture(next(path for path in FILES if path.stem == "gptq-4"))
    config = dict(source.config["quantization_config"]) | {"checkpoint_format": "gptq_v2"}
    zeros = source.tensors["q.qzeros"]
    # What GPTQModel's convert_gptq_v1_to_v2_format does: 1 more in every nibble.
    raised = zeros.read().view(np.uint32) + np.uint32(0x11111111)
    tensors = dict(source.tensors) | {
        "q.qzeros": ArrayTensor("q.qzeros", "i32", zeros.shape, raised.view(np.int32))
    }
    assert_bits(packed(source_of(config, tensors)).read(), expected["expected.q"].read())
    other = packed(source_of(config, source.tensors)).read()
    assert (other != expected["expected.q"].read()).any()


# --- bitsandbytes --------------------------------------------------------------------------------------


def bitsandbytes_linear(weight: torch.Tensor, **kind: Any) -> tuple[Any, dict[str, TensorRef]]:
    """The quantized layer, and its tensors as a checkpoint of it has them."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    rows, columns = weight.shape
    if kind:
        layer = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, **kind)
        block = 64
        layer.weight = bitsandbytes.nn.Params4bit(
            weight, requires_grad=False, blocksize=block, compress_statistics=kind["compress_statistics"],
            quant_type=kind["quant_type"],
        )  # fmt: skip
    else:
        layer = bitsandbytes.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    if not kind:
        layer(torch.zeros(1, columns))
    return layer, refs({f"q.{name}": tensor for name, tensor in layer.state_dict().items()})


def test_llm_int8_is_kept():
    weight = torch.randn(64, 333, generator=torch.Generator().manual_seed(0)) * 0.02
    _, tensors = bitsandbytes_linear(weight)
    assert set(tensors) == {"q.weight", "q.SCB", "q.weight_format"}
    tensor = packed(source_of({"quant_method": "bitsandbytes", "load_in_8bit": True}, tensors))
    assert tensor.format == LLM_INT8
    import bitsandbytes

    theirs = bitsandbytes.functional.int8_vectorwise_dequant(
        torch.from_numpy(tensors["q.weight"].read()), torch.from_numpy(tensors["q.SCB"].read())
    )
    assert_bits(tensor.read(), theirs.numpy())
    for name, array in LLM_INT8.pack(weight.numpy()).items():
        np.testing.assert_array_equal(tensor.load()[name], array)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("table", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(32, 256, 64), (300, 192, 64), (24, 96, 32), (7, 33, 1)]
)
def test_four_bit_blocks_are_kept(table, nested, dtype, rows, columns, group):
    """Where a row is no multiple of the block, narrower groups make the same weights."""
    weight = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
    layer, tensors = bitsandbytes_linear(weight, quant_type=table, compress_statistics=nested)
    assert ("q.weight.nested_absmax" in tensors) == nested
    tensor = packed(source_of({"quant_method": "bitsandbytes", "load_in_4bit": True}, tensors))
    assert isinstance(tensor.format, Codebook)
    assert tensor.format.group_size == group
    state = layer.weight.quant_state
    import bitsandbytes

    exact = bitsandbytes.functional.QuantState.from_dict(state.as_dict(packed=True), torch.device("cpu"))
    exact.dtype = torch.float32
    with torch.compiler.set_stance("force_eager"):  # else odd widths compile for 10 seconds
        theirs = bitsandbytes.functional.dequantize_4bit(layer.weight.data, exact)
        rounded = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)
    assert_bits(tensor.read(), theirs.numpy())
    assert torch.equal(torch.from_numpy(tensor.read()).to(dtype), rounded)
    if table == "nf4" and not nested and group == 64:
        assert tensor.format == NF4
        for name, array in NF4.pack(weight.float().numpy()).items():
            np.testing.assert_array_equal(tensor.load()[name], array)


def test_a_changed_table_is_refused():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    _, tensors = bitsandbytes_linear(weight, quant_type="nf4", compress_statistics=False)
    table = tensors["q.weight.quant_map"].read().copy()
    table[3] *= 2
    tensors["q.weight.quant_map"] = replace(tensors["q.weight.quant_map"], values=table)
    tensor = packed(source_of({"quant_method": "bitsandbytes"}, tensors))
    with pytest.raises(ModelFormatError, match="quant_map"):
        tensor.read()


# --- 8-bit floats --------------------------------------------------------------------------------------


def float8(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    random = torch.randint(0, 256, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(
        torch.uint8
    )
    random[(random & 0x7F) == 0x7F] = 0
    return random.view(torch.float8_e4m3fn)


@pytest.mark.parametrize("exponents", [False, True])
@pytest.mark.parametrize("grid", [(2, 3), (1, 1), (4, 1)])
def test_blocks_are_dequantized_as_by_transformers(grid, exponents):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = float8(64, 96)
    generator = torch.Generator().manual_seed(2)
    scale = torch.rand(grid, generator=generator) * 0.01
    if exponents:
        scale = torch.randint(100, 130, grid, generator=generator).to(torch.uint8).view(torch.float8_e8m0fnu)
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    tensors = refs({"q.weight": weight, "q.weight_scale_inv": scale})
    block = [64 // grid[0], 96 // grid[1]]
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    source = open_quantized(source_of(config, tensors))
    assert_bits(source.tensors["q.weight"].read(), theirs.numpy())
    assert any("16 or more" in notice for notice in source.notices)


def test_blocks_that_do_not_divide_the_matrix():
    """The last blocks are cut short, as DeepSeek's own kernels take them; transformers refuses such a matrix."""
    weight, scale = float8(70, 100), torch.rand((3, 4), generator=torch.Generator().manual_seed(2))
    config = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    tensors = refs({"q.weight": weight, "q.weight_scale_inv": scale})
    by_value = scale.repeat_interleave(32, 0)[:70].repeat_interleave(32, 1)[:, :100]
    assert_bits(packed(source_of(config, tensors)).read(), (weight.float() * by_value).numpy())


def test_a_scale_for_each_row():
    weight, scale = float8(64, 96), torch.rand((64, 1), generator=torch.Generator().manual_seed(2))
    tensors = refs({"q.weight": weight, "q.weight_scale": scale})
    tensor = packed(source_of({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, tensors))
    assert_bits(tensor.read(), (weight.float() * scale).numpy())
    assert tensor.format.nbytes(64, 96) == 64 * 96 + 64 * 4


def test_codes_that_are_no_numbers_are_refused():
    weight = float8(8, 8)
    weight.view(torch.uint8)[3, 3] = 0xFF
    tensors = refs({"q.weight": weight, "q.weight_scale": torch.ones(8, 1)})
    with pytest.raises(ModelFormatError, match="not a number"):
        packed(source_of({"quant_method": "fbgemm_fp8"}, tensors)).read()


# --- what is refused -----------------------------------------------------------------------------------


def test_full_precision_is_left_alone():
    source = replace(source_of({}, {}), config={"model_type": "llama"})
    assert open_quantized(source) is source


@pytest.mark.parametrize("method", ["aqlm", "quanto", "hqq", "mxfp4", "torchao", "something new"])
def test_unknown_methods_are_refused_by_name(method):
    with pytest.raises(UnsupportedConfigError, match=method) as raised:
        open_quantized(source_of({"quant_method": method}, {}))
    assert raised.value.key == "quantization_config"
    assert "GGUF" in raised.value.remedy


@pytest.mark.parametrize("config", [{"bits": 4}, "gptq", ["gptq"], {"quant_method": 4}])
def test_a_config_without_a_method_is_malformed(config):
    with pytest.raises(ModelFormatError, match="quant_method"):
        open_quantized(source_of(config, {}))


def test_a_config_whose_tensors_are_not_quantized_is_refused():
    tensors = refs({"q.weight": torch.ones(4, 4)})
    for method in ("bitsandbytes", "fp8"):
        with pytest.raises(IncompatibleModelError, match="no tensor in it is quantized"):
            open_quantized(source_of({"quant_method": method}, tensors))


@pytest.mark.parametrize(
    ("stem", "changes", "key"),
    [
        ("gptq-4", {"bits": 3}, "bits"),
        ("gptq-4", {"bits": 2}, "bits"),
        ("gptq-4", {"checkpoint_format": "marlin"}, "checkpoint_format"),
        ("gptq-4", {"dynamic": {"+:q": {"bits": 8}}}, "dynamic"),
        ("gptq-4", {"new_key": 1}, "new_key"),
        ("gptq-4", {"group_size": "all"}, "group_size"),
        ("awq-4", {"bits": 8}, "bits"),
        ("awq-4", {"version": "gemv"}, "version"),
        ("compressed-w4a16-g32", {"format": "marlin-24"}, "format"),
        ("compressed-w4a16-g32", {"sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
        ("compressed-w4a16-g32", {"sparsity_config": "dense"}, "sparsity_config"),
        ("compressed-w4a16-g32", {"transform_config": {"config_groups": {"a": 1}}}, "transform_config"),
        ("compressed-w4a16-g32", {"config_groups": {}}, "config_groups"),
    ],
)
def test_settings_that_change_the_numbers_are_refused_by_name(stem, changes, key):
    source, _ = fixture(next(path for path in FILES if path.stem == stem))
    config = dict(source.config["quantization_config"]) | changes
    with pytest.raises(UnsupportedConfigError, match=key) as raised:
        open_quantized(source_of(config, source.tensors))
    assert raised.value.key == key


def weights_scheme(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """The compressed-tensors config with its weights' scheme changed."""
    ((name, group),) = config["config_groups"].items()
    return {**config, "config_groups": {name: {**group, "weights": {**group["weights"], **changes}}}}


@pytest.mark.parametrize(
    ("stem", "part"),
    [
        ("gptq-4-act", "g_idx"),
        ("compressed-w4a16-zero", "weight_zero_point"),
        ("compressed-w8a16-zero", "weight_zero_point"),
    ],
)
def test_a_part_that_the_config_promises_must_be_there(stem, part):
    source, _ = fixture(Path(__file__).parent / "checkpoints" / f"{stem}.safetensors")
    config = source.config["quantization_config"]
    without = {name: tensor for name, tensor in source.tensors.items() if name != f"q.{part}"}
    assert len(without) == len(source.tensors) - 1
    with pytest.raises(ModelFormatError, match=f"q has no {part}, though the config"):
        open_quantized(source_of(config, without))


@pytest.mark.parametrize("actorder", ["group", "dynamic", True])
@pytest.mark.parametrize("stem", ["compressed-w4a16-g32", "compressed-w8a16-zero"])
def test_an_order_by_group_must_be_there(stem, actorder):
    source, _ = fixture(Path(__file__).parent / "checkpoints" / f"{stem}.safetensors")
    config = source.config["quantization_config"]
    with pytest.raises(ModelFormatError, match="q has no weight_g_idx, though the config"):
        open_quantized(source_of(weights_scheme(config, actorder=actorder), source.tensors))
    for in_order in ("weight", "static", False, None):
        packed(source_of(weights_scheme(config, actorder=in_order), source.tensors))
    with pytest.raises(UnsupportedConfigError, match="actorder"):
        open_quantized(source_of(weights_scheme(config, actorder="new"), source.tensors))


def test_int8_weights_have_what_their_scheme_promises():
    rng = np.random.default_rng(0)
    codes = rng.integers(-128, 128, (4, 64)).astype(np.int8)
    scales = rng.random((4, 2)).astype(np.float32)
    groups = rng.permutation(np.repeat([0, 1], 32)).astype(np.int32)
    tensors = {
        name: ArrayTensor(name, dtype, values.shape, values)
        for name, dtype, values in (
            ("q.weight", "i8", codes),
            ("q.weight_scale", "f32", scales),
            ("q.weight_g_idx", "i32", groups),
        )
    }
    source, _ = fixture(Path(__file__).parent / "checkpoints" / "compressed-int8-channel.safetensors")
    scheme = {"strategy": "group", "group_size": 32, "actorder": "group"}
    config = weights_scheme(source.config["quantization_config"], **scheme)
    assert_bits(packed(source_of(config, tensors)).read(), codes * scales[:, groups])
    with pytest.raises(ModelFormatError, match="weight_g_idx"):
        open_quantized(source_of(config, {n: t for n, t in tensors.items() if not n.endswith("g_idx")}))
    with pytest.raises(ModelFormatError, match="weight_zero_point"):
        open_quantized(source_of(weights_scheme(config, symmetric=False), tensors))


def test_float_weights_have_no_zeros():
    source, _ = fixture(Path(__file__).parent / "checkpoints" / "compressed-float8-channel.safetensors")
    config = weights_scheme(source.config["quantization_config"], symmetric=False)
    with pytest.raises(UnsupportedConfigError, match="symmetric"):
        open_quantized(source_of(config, source.tensors))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_missing_or_misshapen_part_is_refused(path: Path):
    """Every part on its own: gone, of another type, cut or not finite; nothing else is raised."""
    source, expected = fixture(path)
    config = source.config["quantization_config"]
    optional = set() if config.get("desc_act") else {"g_idx"}  # in order it says nothing

    def refused(tensors: Mapping[str, TensorRef]) -> None:
        try:
            found = packed(source_of(config, tensors))
            found.read()
        except IncompatibleModelError:
            return
        # A valid module of another shape: refused where the config's shape is known.
        assert found.shape != expected["expected.q"].shape

    for name, tensor in source.tensors.items():
        if name == "q.bias":
            continue
        others = {other: t for other, t in source.tensors.items() if other != name}
        if name.removeprefix("q.") not in optional:
            with pytest.raises((IncompatibleModelError, KeyError, AssertionError)):
                packed(source_of(config, others)).read()
        values = tensor.read()
        refused(others | {name: ArrayTensor(name, "f64", tensor.shape, values.astype(np.float64))})
        cut = values[:-1] if values.ndim else values.reshape(1, 1, 1)
        if cut.size == 0:
            cut = np.zeros((3, 5), values.dtype)
        refused(others | {name: ArrayTensor(name, tensor.dtype, cut.shape, cut)})
        if tensor.dtype in ("f16", "f32"):
            broken = np.full_like(values, np.nan)
            refused(others | {name: ArrayTensor(name, tensor.dtype, tensor.shape, broken)})
