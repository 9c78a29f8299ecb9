"""From a checkpoint's tensors to packed parameters: which format each one gets, and its arrays.

One parameter at a time, in row blocks: beside the result no more than a few MiB are held, whatever the tensor's size
(of a quantized Hugging Face checkpoint, the tensor). Storing the arrays is `octavo.weights`' work. Shape letters:
N output rows, K input columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from octavo.errors import ModelFormatError
from octavo.models.parameters import Parameter
from octavo.quant import format_named, split_stored
from octavo.quant.affine import INT8
from octavo.quant.checkpoint import PackedTensor
from octavo.quant.format import Format
from octavo.quant.plain import Plain
from octavo.quant.rows import row_blocks
from octavo.quant.stored import require_stored_format
from octavo.types import TensorRef

_VECTOR = Plain("f32")

_FOUR_BITS = ("int4", "nf4")
_HEAD = "head.weight"

_BLOCK_VALUES = 1 << 21
"""8 MiB of float32 between two formats."""


def choose_formats(
    parameters: Sequence[Parameter], tensors: Mapping[str, TensorRef], quant: str
) -> dict[str, Format]:
    """The format of each parameter, by name, for what the user asked as `--quant`.

    Vectors and routers are always float32. For matrices and embeddings:

    - "auto": as stored where the source is block-quantized; else int8, but in a checkpoint that is
      block-quantized elsewhere its full-precision matrices stay as stored: whoever made it chose so.
    - "none": the source's own type; float32 where it is block-quantized, the only type that holds its
      dequantized values exactly.
    - "int8", "llm-int8": that one, embedding and head included (transformers keeps bitsandbytes away from
      the head; the row rule is the same there, and they are a quarter of a small model).
    - "int4", "nf4": that one for the layers' matrices, int8 for embedding and head, which 4 bits hurt most.

    Raises ModelFormatError where a tensor is missing or has another shape than the config says,
    IncompatibleModelError where its type cannot be read, InvalidParameterError for an unknown name.
    """
    stored = {parameter.name: _stored_format(parameter, tensors) for parameter in parameters}
    _require_whole(parameters, tensors)
    packable = [parameter.name for parameter in parameters if parameter.role in ("matrix", "embedding")]
    formats: dict[str, Format] = {parameter.name: _VECTOR for parameter in parameters}
    if quant == "auto":
        already_quantized = not all(isinstance(stored[name], Plain) for name in packable)
        formats |= {name: stored[name] if already_quantized else INT8 for name in packable}
    elif quant == "none":
        formats |= {name: stored[name] if isinstance(stored[name], Plain) else _VECTOR for name in packable}
    else:
        chosen = format_named(quant)
        formats |= dict.fromkeys(packable, chosen)
        if quant in _FOUR_BITS:
            formats |= {p.name: INT8 for p in parameters if p.role == "embedding" or p.name == _HEAD}
    return formats


def pack_parameter(
    parameter: Parameter, tensors: Mapping[str, TensorRef], format: Format
) -> dict[str, np.ndarray]:
    """The parameter's arrays in `format`, its row slice, row order and addend applied.

    As stored the numbers are the source's own; else they are packed from its exact float32 values. Raises as
    `choose_formats`, and ModelFormatError where a weight is not finite; the message names the parameter.
    """
    source = _source(parameter, tensors)
    try:
        if parameter.role == "vector":
            return format.pack(_vector(parameter, source))
        return _matrix(parameter, source, format)
    except ModelFormatError as error:
        raise ModelFormatError(f"{parameter.name}: {error.message}", remedy=error.remedy) from error


def _vector(parameter: Parameter, source: TensorRef) -> np.ndarray:
    """float32 [N]."""
    stored = require_stored_format(source.dtype, source.name)
    (length,) = source.shape
    arrays = split_stored(source.dtype, source.read().reshape(1, -1), length)
    values = stored.unpack(arrays, length).reshape(length)[_rows(parameter)]
    return values + np.float32(parameter.add) if parameter.add else values


def _matrix(parameter: Parameter, source: TensorRef, format: Format) -> dict[str, np.ndarray]:
    stored = _format_of(source)
    rows, columns = parameter.shape
    read = _reader(source, _rows(parameter), columns)
    if format == stored:
        return read(slice(None))
    packed: dict[str, np.ndarray] = {}
    for block in row_blocks((rows, columns), _BLOCK_VALUES):
        weight = stored.unpack(read(block), columns)
        for name, part in format.pack(weight).items():
            whole = packed.setdefault(name, np.empty((rows, *part.shape[1:]), part.dtype))
            whole[block] = part
    return packed


def _reader(
    source: TensorRef, rows: slice | np.ndarray, columns: int
) -> Callable[[slice], dict[str, np.ndarray]]:
    """From a slice of `rows` of the source to its arrays, as stored: no stored type mixes rows."""
    if isinstance(source, PackedTensor):
        arrays = source.format.select_rows(source.load(), rows)
        return lambda block: source.format.select_rows(arrays, block)
    stacked = source.read()  # of experts [E, N, bytes]: rows are counted through the first two
    raw = stacked.reshape(-1, stacked.shape[-1])[rows]
    return lambda block: split_stored(source.dtype, raw[block], columns)


def _rows(parameter: Parameter) -> slice | np.ndarray:
    """Which rows of the source are the parameter's, in its order."""
    first, last = parameter.rows or (0, parameter.shape[0])
    if parameter.unpermute_heads is None:
        return slice(first, last)
    by_head = np.arange(first, last).reshape(parameter.unpermute_heads, -1, 2)
    order: np.ndarray = by_head.swapaxes(1, 2).reshape(-1)
    return order


def _stored_format(parameter: Parameter, tensors: Mapping[str, TensorRef]) -> Format:
    return _format_of(_source(parameter, tensors))


def _format_of(source: TensorRef) -> Format:
    if isinstance(source, PackedTensor):
        return source.format
    return require_stored_format(source.dtype, source.name)


def _require_whole(parameters: Sequence[Parameter], tensors: Mapping[str, TensorRef]) -> None:
    """Refuse a fused tensor with more rows than its parameters take: it would be cut in the wrong places."""
    ends: dict[str, int] = {}
    for parameter in parameters:
        if parameter.rows is not None:
            ends[parameter.source] = max(ends.get(parameter.source, 0), parameter.rows[1])
    for source, end in ends.items():
        shape = tensors[source].shape
        rows = shape[0] * shape[1] if len(shape) == 3 else shape[0]
        if rows != end:
            raise ModelFormatError(
                f"the tensor {source} is {list(shape)}, {rows} rows, but the config makes {end} of them",
                remedy="The config and the weights are not of the same model: fetch the model again.",
            )


def _source(parameter: Parameter, tensors: Mapping[str, TensorRef]) -> TensorRef:
    source = tensors.get(parameter.source)
    if source is None:
        raise ModelFormatError(
            f"the checkpoint has no tensor {parameter.source}, which holds {parameter.name} {list(parameter.shape)}",
            remedy="The download may be incomplete, or the config of another model: fetch the model again.",
        )
    shape: tuple[int, ...] = source.shape
    if parameter.rows is not None and len(shape) == 3:
        shape = (shape[0] * shape[1], shape[2])
    first, last = parameter.rows or (0, shape[0] if shape else 0)
    fits = 0 <= first <= last <= shape[0] if shape else False
    if not fits or (last - first, *shape[1:]) != parameter.shape:
        part = "" if parameter.rows is None else f" in rows {first} to {last}"
        raise ModelFormatError(
            f"the tensor {parameter.source} is {list(source.shape)}, but the config makes {parameter.name} "
            f"{list(parameter.shape)}{part}",
            remedy="The config and the weights are not of the same model: fetch the model again.",
        )
    heads = parameter.unpermute_heads
    if heads is not None and parameter.shape[0] % (2 * heads):
        raise ModelFormatError(
            f"{parameter.name} has {parameter.shape[0]} rows, which {heads} heads of rotary pairs do not divide",
            remedy="The config and the weights are not of the same model: fetch the model again.",
        )
    return source
