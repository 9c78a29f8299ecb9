"""Quantized Hugging Face checkpoints: their own numbers, as parameters' formats and arrays.

`open_quantized` replaces the tensors of each quantized module by one `PackedTensor` named as the full-precision
weight would be; nothing after it knows of the method. One file a method, registered here; what stands in the
tensors decides which modules are quantized, so modules left alone need no list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from octavo.errors import IncompatibleModelError, ModelFormatError, UnsupportedConfigError
from octavo.models.config_reader import ConfigReader
from octavo.quant.checkpoint import awq, bitsandbytes, compressed, float8, gptq
from octavo.quant.checkpoint.modules import Modules
from octavo.quant.checkpoint.packed_tensor import PackedTensor
from octavo.types import ModelSource

__all__ = ["PackedTensor", "open_quantized"]

_METHODS: Mapping[str, Callable[[ConfigReader, Modules], None]] = {
    "awq": awq.read,
    "bitsandbytes": bitsandbytes.read,
    "compressed-tensors": compressed.read,
    "fbgemm_fp8": float8.read_rows,
    "fp8": float8.read_blocks,
    "gptq": gptq.read,
}
"""By `quant_method`."""


def open_quantized(source: ModelSource) -> ModelSource:
    """The source with its quantized tensors readable; itself where its config says nothing of quantization.

    Only headers and small descriptions are read. Raises UnsupportedConfigError naming a method or setting whose
    numbers cannot be kept, and ModelFormatError where tensors do not fit together; what only the values can
    show is raised when they are read.
    """
    config = source.config.get("quantization_config")
    if not config:
        return source
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    if not isinstance(config, Mapping) or not isinstance(method, str):
        raise ModelFormatError(
            "quantization_config does not say its quant_method",
            remedy="Fetch the checkpoint again, or use the full-precision one.",
        )
    if method not in _METHODS:
        raise UnsupportedConfigError(
            f"the checkpoint is quantized by {method!r}, whose numbers Octavo cannot keep "
            f"(it can: {', '.join(sorted(_METHODS))})",
            remedy="Use the full-precision checkpoint of the same model, or a GGUF of it.",
            key="quantization_config",
        )
    reader = ConfigReader(config, f"{method} quantization")
    reader.raw("quant_method")
    modules = Modules(source.tensors)
    _METHODS[method](reader, modules)
    reader.finish()
    if not modules.packed:
        raise IncompatibleModelError(
            f"the config says that {method} quantized the checkpoint, but no tensor in it is quantized",
            remedy="Fetch the checkpoint again; if its weights are in full precision, remove quantization_config.",
        )
    sizes: dict[str, int] = {}
    for tensor in modules.packed:
        sizes[tensor.format.name] = sizes.get(tensor.format.name, 0) + tensor.nbytes
    return replace(
        source,
        tensors=modules.tensors,
        quantized_as=tuple(sorted(sizes, key=lambda name: -sizes[name])),
        notices=(*source.notices, *modules.notices),
    )
