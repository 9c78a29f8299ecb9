"""AWQ checkpoints (AutoAWQ's GEMM layout): 4 bits, groups along K, a zero each.

    qweight int32 [K, N / 8]       a word: 8 consecutive rows of a column in the order 0 2 4 6 1 3 5 7
    qzeros  int32 [groups, N / 8]  in the same order
    scales  f16   [groups, N]      weight[n, k] = (code - zero) * scale

Layout: AutoAWQ 0.2.9, awq/modules/linear/gemm.py. Shape letters: N output rows, K input columns.
"""

from __future__ import annotations

import numpy as np

from octavo.models.config_reader import ConfigReader
from octavo.quant.affine import Affine
from octavo.quant.checkpoint.column_groups import group_columns
from octavo.quant.checkpoint.integers import from_words
from octavo.quant.checkpoint.modules import Module, Modules
from octavo.quant.nibbles import join_nibbles
from octavo.quant.rows import row_blocks

_ROW_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)

_SAID_BY_TENSORS = """
    modules_to_not_convert backend do_fuse fuse_max_seq_len modules_to_fuse exllama_config zero_point
""".split()


def read(config: ConfigReader, modules: Modules) -> None:
    for key in ("bits", "w_bit"):
        if config.integer(key, 4) != 4:
            raise config.unsupported(key, "is not 4")
    size_key = "q_group_size" if config.has("q_group_size") else "group_size"
    if config.text("version", "gemm").lower() != "gemm":
        raise config.unsupported("version", "is not gemm, the layout that checkpoints are shared in")
    for key in _SAID_BY_TENSORS:
        config.raw(key)
    for module in modules.holding("qweight", "qzeros scales"):
        _module(config, size_key, modules, module)


def _module(config: ConfigReader, size_key: str, modules: Modules, module: Module) -> None:
    columns, words = module.part("qweight", "i32", 2).shape
    group_size = group_columns(config, size_key, columns)
    rows = words * 8
    groups = 1 if group_size is None else -(-columns // group_size)
    scales = module.part("scales", "f16 bf16 f32", 2)
    module.expect("scales", (groups, rows))
    module.part("qzeros", "i32", 2)
    module.expect("qzeros", (groups, words))
    kept = Affine(
        name="awq-4" + ("" if group_size is None else f"-g{group_size}"),
        bits=4,
        group_size=group_size,
        zero="integer",
        scales="f16" if scales.dtype == "f16" else "f32",
        scale_rule="step",
        rounding=None,
    )

    def load() -> dict[str, np.ndarray]:
        stored = module.parts["qweight"].read()
        codes = np.empty((rows, (columns + 1) // 2), np.uint8)
        for block in row_blocks((words, 8 * columns)):
            part = slice(8 * block.start, 8 * block.stop)
            codes[part] = join_nibbles(_in_row_order(stored[:, block]).T)
        zeros = _in_row_order(module.parts["qzeros"].read())
        return {
            "codes": codes,
            "scales": np.ascontiguousarray(module.floats("scales").T),
            "zeros": np.ascontiguousarray(zeros.T).astype(np.int8),
        }

    modules.put(module, (rows, columns), kept, load)


def _in_row_order(words: np.ndarray) -> np.ndarray:
    """int32 [k, W] -> uint8 [k, 8 W], the codes of consecutive rows."""
    nibbles = from_words(words, 4, 8 * words.shape[1]).reshape(*words.shape, 8)
    ordered = np.empty_like(nibbles)
    ordered[..., _ROW_OF_NIBBLE] = nibbles
    return ordered.reshape(len(words), -1)
