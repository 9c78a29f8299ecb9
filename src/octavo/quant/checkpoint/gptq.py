"""GPTQ checkpoints (AutoGPTQ, GPTQModel): 4 or 8 bits, groups along K, a zero each, perhaps in act-order.

    qweight int32 [K * bits / 32, N]     a word: consecutive columns of a row, lowest bits first
    qzeros  int32 [groups, N * bits / 32]  "gptq" stores each zero less 1, "gptq_v2" as it is
    scales  f16   [groups, N]            weight[n, k] = (code - zero) * scale of the group of column k
    g_idx   int32 [K]                    the group of each column

Layout: AutoGPTQ 0.7.1, nn_modules/qlinear/qlinear_cuda.py. Shape letters: N output rows, K input columns.
"""

from __future__ import annotations

from typing import Literal, cast

import numpy as np

from octavo.models.config_reader import ConfigReader
from octavo.quant.affine import Affine
from octavo.quant.checkpoint.column_groups import column_order, group_columns
from octavo.quant.checkpoint.integers import codes_of_columns, from_words, reordered, zeros_of
from octavo.quant.checkpoint.modules import Module, Modules

_SAID_BY_TENSORS = """
    damp_percent static_groups sym true_sequential model_name_or_path model_file_base_name lm_head
    pack_dtype meta tokenizer dataset batch_size pad_token_id block_name_to_quantize modules_in_block_to_quantize
    module_name_preceding_first_block cache_block_outputs use_cuda_fp16 use_exllama exllama_config disable_exllama
    max_input_length model_seqlen backend act_group_aware hyb_act is_marlin_format damp_auto_increment mse
    quantizer modules_to_not_convert
""".split()
"""How the codes were found, which kernels to use, or what the tensors say themselves."""


def read(config: ConfigReader, modules: Modules) -> None:
    bits = config.integer("bits")
    if bits not in (4, 8):
        raise config.unsupported("bits", "is not 4 or 8")
    layout = config.text("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise config.unsupported("checkpoint_format", "is not gptq or gptq_v2")
    for key in _SAID_BY_TENSORS:
        config.raw(key)
    reorders = config.flag("desc_act", False)
    for module in modules.holding("qweight", "qzeros scales g_idx"):
        _module(config, modules, module, bits, layout == "gptq", reorders)


def _module(
    config: ConfigReader, modules: Modules, module: Module, bits: int, less_one: bool, reorders: bool
) -> None:
    words, rows = module.part("qweight", "i32", 2).shape
    columns = words * 32 // bits
    group_size = group_columns(config, "group_size", columns)
    groups = 1 if group_size is None else -(-columns // group_size)
    scales = module.part("scales", "f16 bf16 f32", 2)
    module.expect("scales", (groups, rows))
    module.part("qzeros", "i32", 2)
    module.expect("qzeros", (groups, -(-rows * bits // 32)))
    order = column_order(module, "g_idx", columns, group_size, promised=reorders)
    kept = Affine(
        name=f"gptq-{bits}"
        + ("" if group_size is None else f"-g{group_size}")
        + ("-act" if order is not None else ""),
        bits=cast("Literal[4, 8]", bits),
        group_size=group_size,
        zero="integer",
        scales="f16" if scales.dtype == "f16" else "f32",
        scale_rule="step",
        rounding=None,
        ordered=order is not None,
    )

    def load() -> dict[str, np.ndarray]:
        zeros = from_words(module.parts["qzeros"].read(), bits, rows)
        if less_one:
            # A stored 15 (255) is a zero of 0, as AutoGPTQ masks it.
            zeros = zeros + np.uint8(1) & np.uint8((1 << bits) - 1)
        codes = codes_of_columns(module.parts["qweight"].read(), bits)
        arrays = {
            "codes": codes if order is None else reordered(codes, bits, order),
            "scales": np.ascontiguousarray(module.floats("scales").T),
            "zeros": np.ascontiguousarray(zeros_of(zeros, bits).T),
        }
        return arrays if order is None else arrays | {"order": order}

    modules.put(module, (rows, columns), kept, load)
