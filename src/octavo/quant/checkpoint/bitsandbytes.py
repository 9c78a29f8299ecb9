"""bitsandbytes checkpoints: LLM.int8 rows, and nf4 or fp4 blocks, their absmax quantized again or not.

    8 bits: weight i8 [N, K]; SCB f32 [N]; weight_format u8, 0                weight = code * SCB / 127
    4 bits: weight (bytes of N * K / 2 pairs, the first in the high nibble); weight.absmax; weight.quant_map;
            weight.quant_state.bitsandbytes__nf4 or fp4: JSON, with blocksize and shape
    nested: weight.absmax u8, weight.nested_quant_map and weight.nested_absmax f32, nested_offset in the JSON

4-bit blocks run over the flattened matrix. Where K is no multiple of the block, groups of the greatest common
divisor of both lie within one block and one row each: more scales, the same weights. Nested scales become the
float32 numbers they stand for. Layout: bitsandbytes 0.50, functional.QuantState. Shape letters: N output rows,
K input columns.
"""

from __future__ import annotations

import json
from dataclasses import replace
from math import gcd
from typing import Any

import numpy as np

from octavo.models.config_reader import ConfigReader
from octavo.quant.affine import LLM_INT8
from octavo.quant.checkpoint.modules import Module, Modules
from octavo.quant.codebook import NF4
from octavo.quant.tables import TABLES

_SAID_BY_TENSORS = """
    load_in_8bit load_in_4bit bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant
    bnb_4bit_quant_storage llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight llm_int8_skip_modules
    llm_int8_threshold modules_to_not_convert
""".split()

_STATE = "weight.quant_state.bitsandbytes__"
_MAX_STATE_BYTES = 1 << 16


def read(config: ConfigReader, modules: Modules) -> None:
    for key in _SAID_BY_TENSORS:
        config.raw(key)
    for module in modules.holding("SCB", "weight weight_format"):
        _rows(modules, module)
    for table in ("nf4", "fp4"):
        parts = "weight weight.absmax weight.quant_map weight.nested_absmax weight.nested_quant_map"
        for module in modules.holding(_STATE + table, parts):
            _blocks(modules, module, table)


def _rows(modules: Modules, module: Module) -> None:
    rows, columns = module.part("weight", "i8", 2).shape
    module.part("SCB", "f32", 1)
    module.expect("SCB", (rows,))

    def load() -> dict[str, np.ndarray]:
        if "weight_format" in module.parts and module.parts["weight_format"].read().any():
            raise module.malformed("has a weight_format that is not row by row")
        return {"codes": module.parts["weight"].read(), "scales": module.floats("SCB")[:, None]}

    modules.put(module, (rows, columns), LLM_INT8, load)


def _blocks(modules: Modules, module: Module, table: Any) -> None:
    state = _state(module, table)
    block, (rows, columns) = state["blocksize"], state["shape"]
    weight = module.part("weight", "u8 i8 bf16 f16 f32")
    if weight.nbytes != (rows * columns + 1) // 2:
        raise module.malformed(f"has {weight.nbytes} bytes of codes for [{rows}, {columns}]")
    count = -(-rows * columns // block)
    nested = "nested_blocksize" in state
    for suffix, dtype, length in (
        ("weight.absmax", "u8" if nested else "f32", count),
        ("weight.quant_map", "f32", 16),
        *([("weight.nested_absmax", "f32", -(-count // state["nested_blocksize"]))] if nested else []),
        *([("weight.nested_quant_map", "f32", 256)] if nested else []),
    ):
        module.part(suffix, dtype, 1)
        module.expect(suffix, (length,))
    group = gcd(columns, block)
    kept = replace(NF4, name=f"{table}-g{group}", table=table, group_size=group, rounding=None)
    if table == "nf4" and group == NF4.group_size:
        kept = NF4

    def load() -> dict[str, np.ndarray]:
        if not np.array_equal(module.floats("weight.quant_map"), TABLES[table]):
            raise module.malformed(f"has a quant_map that is not {table}'s")
        absmax = _nested(module, state) if nested else module.floats("weight.absmax")
        first_columns = np.arange(rows * columns // group) * group
        scales = np.ascontiguousarray(absmax[first_columns // block].reshape(rows, -1))
        return {"codes": _codes(weight.read(), rows, columns), "scales": scales}

    modules.put(module, (rows, columns), kept, load)


def _state(module: Module, table: str) -> dict[str, Any]:
    """The description of a 4-bit module, checked."""
    part = module.part(_STATE + table, "u8", 1)
    if part.nbytes > _MAX_STATE_BYTES:
        raise module.malformed(f"has a quant_state of {part.nbytes:,} bytes")
    try:
        state = json.loads(part.read().tobytes())
    except ValueError as error:
        raise module.malformed(f"has a quant_state that is not JSON: {error}") from error
    numbers = [state.get("blocksize"), *(state.get("shape") or [])] if isinstance(state, dict) else []
    nested = isinstance(state, dict) and "nested_blocksize" in state
    if nested:
        numbers.append(state["nested_blocksize"])
    fits = len(numbers) == 3 + nested and all(type(n) is int and 0 < n < 1 << 31 for n in numbers)
    if not fits or (nested and not isinstance(state.get("nested_offset"), float)):
        raise module.malformed(f"has a quant_state that is not of a matrix: {state!s:.200}")
    if state.get("quant_type") != table:
        raise module.malformed(f"has a quant_state of {state.get('quant_type')!r:.20}, not of {table}")
    checked: dict[str, Any] = state
    return checked


def _nested(module: Module, state: dict[str, Any]) -> np.ndarray:
    """float32 absmax of each block, as bitsandbytes' dequantize_blockwise and the offset make it."""
    codes = module.parts["weight.absmax"].read()
    shared = module.floats("weight.nested_absmax")[np.arange(len(codes)) // state["nested_blocksize"]]
    absmax: np.ndarray = module.floats("weight.nested_quant_map")[codes] * shared
    absmax += np.float32(state["nested_offset"])
    return absmax


def _codes(stored: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Pairs with the first code in the high nibble, over the flattened matrix -> `codes` of a Codebook format."""
    pairs = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
    if columns % 2 == 0:
        return (pairs >> 4 | pairs << 4).reshape(rows, -1)
    codes = np.stack((pairs >> 4, pairs & 15), axis=-1).reshape(-1)[: rows * columns].reshape(rows, columns)
    joined = codes[:, 0::2].copy()
    joined[:, :-1] |= codes[:, 1::2] << 4
    return joined
