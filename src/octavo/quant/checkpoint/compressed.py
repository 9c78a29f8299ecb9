"""compressed-tensors checkpoints (llm-compressor): weights of 4 or 8 bits packed in words, int8, or e4m3.

    pack-quantized:  weight_packed int32 [N, words of K codes, lowest bits first]; weight_shape [N, K];
                     weight_scale [N, groups]; weight_zero_point int32 [words of N codes, groups] if not symmetric
    int-quantized:   weight i8 [N, K]; weight_scale [N, groups] or one; weight_zero_point i8 likewise
    float-quantized: weight f8_e4m3 [N, K]; weight_scale: one, one a row, or one a block

weight = (code - zero) * scale, codes less 2 ** (bits - 1). Activations are computed in 16 bits or more whatever
the scheme says of them. Layout: compressed-tensors 0.20, compressors/pack_quantized and naive_quantized. Shape
letters: N output rows, K input columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from octavo.models.config_reader import ConfigReader
from octavo.quant.affine import Affine
from octavo.quant.checkpoint.column_groups import column_order, group_columns
from octavo.quant.checkpoint.float8 import SIXTEEN_BIT_ACTIVATIONS, block_shape, put_float8
from octavo.quant.checkpoint.integers import codes_of_rows, from_words, reordered, zeros_of
from octavo.quant.checkpoint.modules import Module, Modules

_BOOKKEEPING = "quantization_status global_compression_ratio ignore version".split()
_WEIGHT_BOOKKEEPING = "observer observer_kwargs scale_dtype zp_dtype dynamic".split()
_IN_ORDER = (False, "weight", "static")
_BY_GROUP = (True, "group", "dynamic")
"""`actorder`: whether a group's columns lie side by side, or where a g_idx says."""
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


def read(config: ConfigReader, modules: Modules) -> None:
    for key in _BOOKKEEPING:
        config.raw(key)
    layout = config.text("format", "")
    if layout not in _FORMATS:
        raise config.unsupported("format", f"is not one of {', '.join(_FORMATS)}")
    sparsity = config.raw("sparsity_config", {})
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        raise config.unsupported("sparsity_config", "says more than how many weights are 0")
    if config.raw("kv_cache_scheme") is not None:
        modules.notices.append(
            "the checkpoint's 8-bit KV cache scheme is not used: --kv-dtype says how keys and values are kept"
        )
    groups = config.raw("config_groups")
    if (
        not isinstance(groups, Mapping)
        or len(groups) != 1
        or not isinstance(next(iter(groups.values())), Mapping)
    ):
        raise config.unsupported("config_groups", "is not one group of modules that share a scheme")
    scheme = ConfigReader(next(iter(groups.values())), "compressed-tensors scheme")
    for key in ("targets", "format"):
        scheme.raw(key)
    activations = scheme.raw("input_activations") is not None
    activations |= scheme.raw("output_activations") is not None
    if activations:
        modules.notices.append(SIXTEEN_BIT_ACTIVATIONS)
    weights = scheme.raw("weights")
    if not isinstance(weights, Mapping):
        raise scheme.unsupported("weights", "does not say how weights are stored")
    scheme.finish()
    _read_weights(ConfigReader(weights, "compressed-tensors weights"), modules)


def _read_weights(scheme: ConfigReader, modules: Modules) -> None:
    bits, kind = scheme.integer("num_bits", 8), scheme.text("type", "int")
    strategy = scheme.raw("strategy")
    scheme.raw("group_size")
    block = block_shape(scheme, "block_structure")
    for key in _WEIGHT_BOOKKEEPING:
        scheme.raw(key)
    zeroed, order = not scheme.flag("symmetric", True), scheme.raw("actorder", False)
    if not isinstance(order, bool | str) or order not in (*_IN_ORDER, *_BY_GROUP):
        raise scheme.unsupported("actorder", "is not group, weight, or true or false")
    scheme.finish()
    parts = "weight_scale weight_zero_point weight_g_idx input_scale input_zero_point output_scale"
    if kind == "float":
        if bits != 8:
            raise scheme.unsupported("num_bits", "is not 8, the only width of float weights that can be read")
        if zeroed:
            raise scheme.unsupported("symmetric", "promises zero points, which float weights do not have")
        if (block is not None) != (strategy == "block"):
            raise scheme.unsupported("block_structure", f"contradicts the strategy {strategy!r}")
        for module in modules.holding("weight_scale", "weight input_scale"):
            put_float8(modules, module, "weight_scale", block)
        return
    if kind != "int" or bits not in (4, 8):
        raise scheme.unsupported("num_bits", f"of type {kind} is not int of 4 or 8")
    if strategy not in ("tensor", "channel", "group"):
        raise scheme.unsupported("strategy", "is not tensor, channel or group")
    sizes = scheme if strategy == "group" else None
    promised = _Promised(zeros=zeroed, order=order in _BY_GROUP)
    for module in modules.holding("weight_packed", f"weight_shape {parts}"):
        _packed(sizes, modules, module, bits, promised)
    if bits == 8:
        for module in modules.holding("weight_scale", f"weight {parts}"):
            if "weight" in module.parts and module.parts["weight"].dtype == "i8":
                _plain_int8(sizes, modules, module, promised)


@dataclass(frozen=True, slots=True)
class _Promised:
    """Parts that the scheme says every module has."""

    zeros: bool
    order: bool


def _packed(
    sizes: ConfigReader | None, modules: Modules, module: Module, bits: int, promised: _Promised
) -> None:
    """`sizes` says the group size; None: one group a row."""
    module.part("weight_shape", "i64 i32", 1)
    module.expect("weight_shape", (2,))
    rows, columns = (int(n) for n in module.parts["weight_shape"].read())
    words = module.part("weight_packed", "i32", 2)
    if words.shape[0] != rows or words.shape[1] != -(-columns * bits // 32):
        raise module.malformed(
            f"has weight_packed {list(words.shape)} for [{rows}, {columns}] of {bits} bits"
        )
    zeroed = _has_zeros(module, promised)
    group = None if sizes is None else group_columns(sizes, "group_size", columns)
    groups = 1 if group is None else -(-columns // group)
    if zeroed:
        module.part("weight_zero_point", "i32", 2)
        module.expect("weight_zero_point", (-(-rows * bits // 32), groups))
    order = column_order(module, "weight_g_idx", columns, group, promised=promised.order)
    kept = _format(module, bits, group, zeroed, order is not None)
    _expect_scales(module, "weight_scale", rows, groups)

    def load() -> dict[str, np.ndarray]:
        codes = codes_of_rows(words.read(), bits, columns)
        arrays = {
            "codes": codes if order is None else reordered(codes, bits, order),
            "scales": _by_row(module.floats("weight_scale"), rows),
        }
        if zeroed:
            stored = module.parts["weight_zero_point"].read()
            arrays["zeros"] = zeros_of(from_words(np.ascontiguousarray(stored.T), bits, rows), bits).T.copy()
        return arrays if order is None else arrays | {"order": order}

    modules.put(module, (rows, columns), kept, load)


def _plain_int8(sizes: ConfigReader | None, modules: Modules, module: Module, promised: _Promised) -> None:
    rows, columns = module.part("weight", "i8", 2).shape
    group = None if sizes is None else group_columns(sizes, "group_size", columns)
    groups = 1 if group is None else -(-columns // group)
    zeroed = _has_zeros(module, promised)
    _expect_scales(module, "weight_scale", rows, groups)
    if zeroed:
        module.part("weight_zero_point", "i8")
        _expect_scales(module, "weight_zero_point", rows, groups)
    order = column_order(module, "weight_g_idx", columns, group, promised=promised.order)
    kept = _format(module, 8, group, zeroed, order is not None)

    def load() -> dict[str, np.ndarray]:
        codes = module.parts["weight"].read()
        arrays = {
            "codes": codes if order is None else reordered(codes, 8, order),
            "scales": _by_row(module.floats("weight_scale"), rows),
        }
        if zeroed:
            arrays["zeros"] = _by_row(module.parts["weight_zero_point"].read(), rows)
        return arrays if order is None else arrays | {"order": order}

    modules.put(module, (rows, columns), kept, load)


def _has_zeros(module: Module, promised: _Promised) -> bool:
    present = "weight_zero_point" in module.parts
    if promised.zeros and not present:
        raise module.malformed("has no weight_zero_point, though the config says that it is not symmetric")
    return present


def _expect_scales(module: Module, suffix: str, rows: int, groups: int) -> None:
    shape = module.part(suffix, "f16 bf16 f32 i8").shape
    if shape != (rows, groups) and not (groups == 1 and shape in ((), (1,), (1, 1), (rows,))):
        raise module.malformed(f"has {suffix} {list(shape)}; expected {[rows, groups]}")


def _by_row(values: np.ndarray, rows: int) -> np.ndarray:
    """[N, groups], [N] or one value -> [N, groups]."""
    if values.size == 1:
        values = np.broadcast_to(values.reshape(1, 1), (rows, 1))
    return np.ascontiguousarray(values.reshape(rows, -1))


def _format(module: Module, bits: int, group: int | None, zeroed: bool, ordered: bool) -> Affine:
    scale = module.part("weight_scale", "f16 bf16 f32")
    name = f"w{bits}a16" + ("" if group is None else f"-g{group}") + ("-zero" if zeroed else "")
    return Affine(
        name=name + ("-act" if ordered else "") + ("" if scale.dtype == "f16" else "-f32"),
        bits=cast("Literal[4, 8]", bits),
        group_size=group,
        zero="integer" if zeroed else "none",
        scales="f16" if scale.dtype == "f16" else "f32",
        scale_rule="step",
        rounding=None,
        ordered=ordered,
    )
