"""8-bit float checkpoints: e4m3 weights with a scale for the tensor, for each row, or for each block.

    fbgemm_fp8: weight f8_e4m3 [N, K]; weight_scale [N, 1]                        weight = code * scale
    fp8:        weight f8_e4m3 [N, K]; weight_scale_inv, one a block of
                `weight_block_size` rows and columns, or one for all; float, or an exponent (f8_e8m0)

A block's scale is kept for each of its rows, since no format mixes rows. Activations, which these checkpoints
are meant to compute in 8 bits, are computed in 16 or more. Layouts: transformers 5, integrations/fbgemm_fp8.py
and finegrained_fp8.py. Shape letters: N output rows, K input columns.
"""

from __future__ import annotations

import numpy as np

from octavo.models.config_reader import ConfigReader
from octavo.quant.checkpoint.modules import Module, Modules
from octavo.quant.codebook import Codebook

SIXTEEN_BIT_ACTIVATIONS = (
    "the checkpoint is meant for activations in 8 bits; Octavo computes them in 16 or more, so its answers may "
    "differ from those of other engines"
)


def read_rows(config: ConfigReader, modules: Modules) -> None:
    for key in ("activation_scale_ub", "modules_to_not_convert"):
        config.raw(key)
    for module in modules.holding("weight_scale", "weight input_scale_ub"):
        put_float8(modules, module, "weight_scale", None)


def read_blocks(config: ConfigReader, modules: Modules) -> None:
    for key in ("activation_scheme", "modules_to_not_convert", "scale_fmt", "dequantize"):
        config.raw(key)
    if config.text("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise config.unsupported("fmt", "is not e4m3")
    block = block_shape(config, "weight_block_size")
    for module in modules.holding("weight_scale_inv", "weight activation_scale input_scale"):
        put_float8(modules, module, "weight_scale_inv", block)


def block_shape(config: ConfigReader, key: str) -> tuple[int, int] | None:
    """Rows and columns of a block as a config states them, None where it does not."""
    block = config.raw(key)
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise config.unsupported(key, "is not two numbers of rows and columns")
    return block[0], block[1]


def put_float8(modules: Modules, module: Module, suffix: str, block: tuple[int, int] | None) -> None:
    """Put a module of e4m3 weights and the scales `suffix`; `block` None: one for all, or one a row."""
    rows, columns = module.part("weight", "f8_e4m3", 2).shape
    scale = module.part(suffix, "f32 f16 bf16 f8_e8m0")
    if block is None:
        if scale.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
            raise module.malformed(f"has {suffix} {list(scale.shape)} for {rows} rows")
    else:
        module.expect(suffix, (-(-rows // block[0]), -(-columns // block[1])))
    group = None if block is None or block[1] >= columns else block[1]
    kept = Codebook("fp8" + ("" if group is None else f"-g{group}"), "e4m3", group, "f32", None)

    def load() -> dict[str, np.ndarray]:
        codes = module.parts["weight"].read()
        if (codes & 0x7F == 0x7F).any():
            raise module.malformed("has a weight that is not a number")
        scales = _scales(module, suffix).astype(np.float32)
        if block is None:
            scales = np.broadcast_to(scales.reshape(-1, 1), (rows, 1))
        else:
            scales = scales[np.arange(rows) // block[0]]
        return {"codes": codes, "scales": np.ascontiguousarray(scales)}

    modules.put(module, (rows, columns), kept, load)
    if SIXTEEN_BIT_ACTIVATIONS not in modules.notices:
        modules.notices.append(SIXTEEN_BIT_ACTIVATIONS)


def _scales(module: Module, suffix: str) -> np.ndarray:
    part = module.parts[suffix]
    if part.dtype != "f8_e8m0":
        return module.floats(suffix)
    exponents = part.read()
    if (exponents == 0xFF).any():
        raise module.malformed(f"has a {suffix} that is not a number")
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)
