"""Which format a parameter gets, and that its numbers are the source's rows, in order, exactly."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from octavo.errors import IncompatibleModelError, InvalidParameterError, ModelFormatError
from octavo.models.parameters import Parameter
from octavo.packing import choose_formats, pack_parameter
from octavo.quant import stored_format
from octavo.quant.affine import INT4, INT8, LLM_INT8, Q4_1, Q8_0
from octavo.quant.codebook import NF4
from octavo.quant.plain import Plain

STORED = ["f32", "f16", "bf16", "q8_0", "q4_1"]
MATRIX = Parameter("layers.0.mixer.q.weight", (64, 96), "matrix", "source")
RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.standard_normal((64, 96)).astype(np.float32)


def dequantized(tensor) -> np.ndarray:
    """The whole source as the gguf package, or numpy, reads it."""
    if tensor.dtype in ("q8_0", "q4_1"):
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        return dequantize(tensor.values, GGMLQuantizationType[tensor.dtype.upper()])
    if tensor.dtype == "bf16":
        return (tensor.values.astype(np.uint32) << 16).view(np.float32)
    return tensor.values.astype(np.float32)


# --- choosing --------------------------------------------------------------------------------------


def checkpoint_of(make_tensor, **dtypes: str):
    """Parameters named by keyword, each in its stored type; `norm` is a vector, `embedding` the table."""
    roles = {"norm": "vector", "embedding": "embedding"}
    parameters, tensors = [], {}
    for name, dtype in dtypes.items():
        role = roles.get(name, "matrix")
        weight = WEIGHT[0] if role == "vector" else WEIGHT
        parameters.append(Parameter(name, weight.shape, role, f"file.{name}"))
        tensors[f"file.{name}"] = make_tensor(dtype, weight, f"file.{name}")
    return parameters, tensors


def test_auto_makes_full_precision_int8(make_tensor):
    parameters, tensors = checkpoint_of(make_tensor, embedding="bf16", q="f16", norm="f16")
    formats = choose_formats(parameters, tensors, "auto")
    assert formats == {"embedding": INT8, "q": INT8, "norm": Plain("f32")}


def test_auto_keeps_what_is_already_quantized(make_tensor):
    parameters, tensors = checkpoint_of(
        make_tensor, embedding="q8_0", q="q4_1", k="f16", v="bf16", o="f32", norm="f32"
    )
    formats = choose_formats(parameters, tensors, "auto")
    plain = {"k": Plain("f16"), "v": Plain("bf16"), "o": Plain("f32"), "norm": Plain("f32")}
    assert formats == {"embedding": Q8_0, "q": Q4_1, **plain}


def test_none_is_the_source_or_float32(make_tensor):
    parameters, tensors = checkpoint_of(make_tensor, embedding="q8_0", q="bf16", k="f16", norm="bf16")
    formats = choose_formats(parameters, tensors, "none")
    assert formats == {name: Plain("f32") for name in ("embedding", "norm")} | {
        "q": Plain("bf16"),
        "k": Plain("f16"),
    }


@pytest.mark.parametrize(("quant", "form"), [("int4", INT4), ("nf4", NF4)])
def test_four_bits_leave_embedding_and_head_at_eight(make_tensor, quant, form):
    parameters, tensors = checkpoint_of(make_tensor, embedding="q8_0", head="bf16", q="q4_1", norm="f32")
    parameters[1] = replace(parameters[1], name="head.weight")
    formats = choose_formats(parameters, tensors, quant)
    assert formats == {"embedding": INT8, "head.weight": INT8, "q": form, "norm": Plain("f32")}


@pytest.mark.parametrize(("quant", "form"), [("int8", INT8), ("llm-int8", LLM_INT8)])
def test_a_named_format_is_every_matrix(make_tensor, quant, form):
    parameters, tensors = checkpoint_of(make_tensor, embedding="q8_0", head="bf16", q="q4_1", norm="f32")
    formats = choose_formats(parameters, tensors, quant)
    assert formats == {"embedding": form, "head": form, "q": form, "norm": Plain("f32")}


def test_unknown_names_are_refused(make_tensor):
    parameters, tensors = checkpoint_of(make_tensor, q="bf16")
    with pytest.raises(InvalidParameterError, match="int9"):
        choose_formats(parameters, tensors, "int9")


@pytest.mark.parametrize("quant", ["auto", "none", "int8"])
def test_what_does_not_fit_the_config_is_refused_before_any_reading(make_tensor, quant):
    tensor = make_tensor("f32", WEIGHT)

    def refused(parameter: Parameter, error: type[Exception], *words: str, **change) -> None:
        source = replace(tensor, **{"values": None} | change)
        with pytest.raises(error) as raised:
            choose_formats([parameter], {"source": source}, quant)
        for word in (parameter.name, *words):
            assert word in f"{raised.value}", raised.value
        assert raised.value.remedy

    refused(replace(MATRIX, source="other"), ModelFormatError, "other", "[64, 96]")
    refused(replace(MATRIX, shape=(96, 64)), ModelFormatError, "[96, 64]", "[64, 96]")
    refused(replace(MATRIX, shape=(64,)), ModelFormatError, "[64]", "[64, 96]")
    refused(replace(MATRIX, rows=(0, 32)), ModelFormatError, "rows 0 to 32")
    refused(replace(MATRIX, rows=(1, 65)), ModelFormatError, "rows 1 to 65")
    refused(replace(MATRIX, rows=(-64, 0)), ModelFormatError, "rows -64 to 0")
    refused(replace(MATRIX, unpermute_heads=5), ModelFormatError, "5 heads")
    refused(MATRIX, ModelFormatError, "[]", shape=())
    refused(replace(MATRIX, name="source"), IncompatibleModelError, "iq2_s", dtype="iq2_s")


def test_a_fused_tensor_with_rows_to_spare_is_refused(make_tensor):
    """It is of another model, and would be cut in the wrong places."""
    halves = [replace(MATRIX, name=f"half.{i}", shape=(32, 96), rows=(32 * i, 32 * i + 32)) for i in (0, 1)]
    tensors = {"source": make_tensor("f32", WEIGHT)}
    assert len(choose_formats(halves, tensors, "auto")) == 2
    with pytest.raises(ModelFormatError, match="64 rows, but the config makes 32 of them"):
        choose_formats(halves[:1], tensors, "auto")


@pytest.mark.parametrize("quant", ["auto", "none", "int8"])
def test_a_router_is_always_float32(make_tensor, quant):
    router = replace(MATRIX, role="router")
    tensors = {"source": make_tensor("bf16", WEIGHT)}
    assert choose_formats([router], tensors, quant) == {router.name: Plain("f32")}
    values = pack_parameter(router, tensors, Plain("f32"))["values"]
    np.testing.assert_array_equal(values, dequantized(tensors["source"]))


# --- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORED)
def test_as_stored_is_the_sources_own_numbers(make_tensor, dtype):
    tensor = make_tensor(dtype, WEIGHT)
    form = stored_format(dtype)
    packed = pack_parameter(MATRIX, {"source": tensor}, form)
    np.testing.assert_array_equal(form.unpack(packed, 96), dequantized(tensor))


@pytest.mark.parametrize("form", [INT8, LLM_INT8, Q8_0, Plain("f32")], ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", STORED)
def test_other_formats_are_packed_from_its_exact_values(make_tensor, dtype, form):
    tensor = make_tensor(dtype, WEIGHT)
    packed = pack_parameter(MATRIX, {"source": tensor}, form)
    expected = form.pack(dequantized(tensor))
    assert packed.keys() == expected.keys()
    for name, array in packed.items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", STORED)
def test_a_slice_of_fused_rows(make_tensor, dtype, quantized):
    tensor = make_tensor(dtype, WEIGHT)
    form = INT8 if quantized else stored_format(dtype)
    part = replace(MATRIX, shape=(16, 96), rows=(40, 56))
    packed = pack_parameter(part, {"source": tensor}, form)
    whole = pack_parameter(MATRIX, {"source": tensor}, form)
    np.testing.assert_array_equal(form.unpack(packed, 96), form.unpack(whole, 96)[40:56])


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", STORED)
def test_an_expert_of_a_stack(make_tensor, dtype, quantized):
    """Rows of a tensor [experts, N, K] are counted through experts."""
    flat = make_tensor(dtype, WEIGHT)
    stack = replace(flat, shape=(4, 16, 96), values=flat.values.reshape(4, 16, -1))
    form = INT8 if quantized else stored_format(dtype)
    experts = [replace(MATRIX, name=f"{e}", shape=(16, 96), rows=(16 * e, 16 * e + 16)) for e in range(4)]
    choose_formats(experts, {"source": stack}, "auto")
    whole = form.unpack(pack_parameter(MATRIX, {"source": flat}, form), 96)
    packed = pack_parameter(experts[2], {"source": stack}, form)
    np.testing.assert_array_equal(form.unpack(packed, 96), whole[32:48])


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


@pytest.mark.parametrize("rows", [None, (32, 64)])
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", STORED)
def test_rotary_pairs_are_put_back(make_tensor, dtype, heads, rows):
    """What the converter did to Hugging Face's rows is undone, on quantized rows too."""
    first, last = rows or (0, 64)
    straight = dequantized(make_tensor(dtype, WEIGHT))[first:last]
    stored = WEIGHT.copy()
    stored[first:last] = permute(WEIGHT[first:last], heads)
    parameter = replace(MATRIX, shape=(last - first, 96), rows=rows, unpermute_heads=heads)
    form = stored_format(dtype)
    packed = pack_parameter(parameter, {"source": make_tensor(dtype, stored)}, form)
    np.testing.assert_array_equal(form.unpack(packed, 96), straight)
    assert (permute(straight, heads) != straight).any()


@pytest.mark.parametrize("dtype", STORED)
def test_vectors_become_float32_with_their_addend(make_tensor, dtype):
    tensor = make_tensor(dtype, WEIGHT[0])
    parameter = Parameter("final_norm.weight", (96,), "vector", "source", add=-1.0)
    values = pack_parameter(parameter, {"source": tensor}, Plain("f32"))["values"]
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, dequantized(tensor) + np.float32(-1))


def test_biases_are_cut_and_ordered_as_their_rows(make_tensor):
    tensor = make_tensor("f16", np.arange(96, dtype=np.float32))
    parameter = Parameter("bias", (32,), "vector", "source", rows=(64, 96), unpermute_heads=2)
    values = pack_parameter(parameter, {"source": tensor}, Plain("f32"))["values"]
    np.testing.assert_array_equal(permute(values, 2), np.arange(64, 96))


def test_a_broken_weight_names_its_parameter(make_tensor):
    tensor = make_tensor("f32", WEIGHT)
    broken = WEIGHT.copy()
    broken[63, 95] = np.nan
    for form in (INT8, LLM_INT8, Plain("f32")):
        with pytest.raises(ModelFormatError, match=r"layers\.0\.mixer\.q\.weight: .*not"):
            pack_parameter(MATRIX, {"source": replace(tensor, values=broken)}, form)


def test_no_full_precision_copy_is_made(make_tensor):
    """A bfloat16 matrix of 32 MiB packs to int8 with a few blocks of float32 beside the result."""
    values = np.full((4096, 4096), 0x3F80, np.uint16)
    tensor = replace(make_tensor("bf16", WEIGHT), shape=values.shape, values=values)
    tracemalloc.start()
    try:
        packed = pack_parameter(replace(MATRIX, shape=values.shape), {"source": tensor}, INT8)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak - sum(array.nbytes for array in packed.values()) < 32 << 20
