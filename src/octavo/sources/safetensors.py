"""A bounded reader of safetensors files: the header, and tensors as views of the mapped file.

Format: the README of huggingface/safetensors. Our own, because the library's numpy reader cannot return
bfloat16. As the format demands, tensors must fill the data section without holes or overlaps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from octavo.errors import ModelFormatError
from octavo.sources.documents import MAX_DOCUMENT_BYTES, parse_object
from octavo.sources.files import FETCH_AGAIN, MappedFile

_LENGTH_BYTES = 8
_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "F8_E4M3": "<u1",
    "F8_E5M2": "<u1",
    "F8_E8M0": "<u1",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "<i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "<u1",
    "BOOL": "?",
}
"""Of the stored values; types numpy lacks are read as their bits."""


@dataclass(frozen=True, slots=True)
class SafeTensor:
    """A `TensorRef` of a safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    stored: np.dtype[Any]
    file: MappedFile
    offset: int
    """In the file, in bytes."""

    def read(self) -> np.ndarray:
        """Stored values of `shape`, read-only; bf16 and 8-bit floats as unsigned integers of their bits."""
        return self.file.array(self.offset, self.nbytes, self.stored).reshape(self.shape)


def read_safetensors(file: MappedFile) -> dict[str, SafeTensor]:
    """The tensors of a mapped file. Raises ModelFormatError for whatever is malformed."""
    header, data_start = _header(file)
    data_bytes = file.size_bytes - data_start
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(file.path, "its __metadata__ is not a map of strings")
    tensors = {name: _tensor(file, name, entry, data_start) for name, entry in header.items()}
    end = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            raise _damaged(
                file.path,
                f"the tensor {tensor.name!r:.100} starts at byte {tensor.offset - data_start:,} of the data, "
                f"not at {end - data_start:,} where the one before ends",
            )
        end += tensor.nbytes
    if end != file.size_bytes:
        raise _damaged(
            file.path, f"its tensors take {end - data_start:,} bytes, but {data_bytes:,} follow the header"
        )
    return tensors


def _header(file: MappedFile) -> tuple[dict[str, Any], int]:
    """The parsed header, and where the data section starts."""
    if file.size_bytes < _LENGTH_BYTES:
        raise _damaged(file.path, f"it has only {file.size_bytes} bytes")
    length = int.from_bytes(file.data[:_LENGTH_BYTES], "little")
    if length > MAX_DOCUMENT_BYTES:
        # The format allows 100 MB; the hub reads 25 MB, and no real header comes near.
        raise _damaged(
            file.path, f"it claims a header of {length:,} bytes; at most {MAX_DOCUMENT_BYTES:,} are read"
        )
    end = _LENGTH_BYTES + length
    if end > file.size_bytes:
        raise _damaged(
            file.path, f"it claims a header of {length:,} bytes but has {file.size_bytes:,} in all"
        )
    text = file.data[_LENGTH_BYTES:end]
    if not text.startswith(b"{"):
        raise _damaged(file.path, "its header does not start with {")
    return parse_object(text, f"the header of {file.path}"), end


def _tensor(file: MappedFile, name: str, entry: object, data_start: int) -> SafeTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(
            file.path, f"the entry {name!r:.100} does not have dtype, shape and data_offsets alone"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _damaged(file.path, f"the tensor {name!r:.100} is of the unknown type {dtype!r:.40}")
    if not _is_shape(shape) or not _is_numbers(offsets) or len(offsets) != 2:
        raise _damaged(file.path, f"the tensor {name!r:.100} has a malformed shape or offsets")
    stored = np.dtype(_DTYPES[dtype])
    nbytes = math.prod(shape) * stored.itemsize
    begin, end = offsets
    if end - begin != nbytes or data_start + end > file.size_bytes:
        raise _damaged(
            file.path,
            f"the tensor {name!r:.100} needs {nbytes:,} bytes for its shape {tuple(shape)!r:.80} and claims bytes "
            f"{begin:,} to {end:,} of {file.size_bytes - data_start:,}",
        )
    return SafeTensor(name, dtype.lower(), tuple(shape), nbytes, stored, file, data_start + begin)


def _is_numbers(value: object) -> TypeGuard[list[int]]:
    """A short list of whole numbers."""
    if not isinstance(value, list) or len(value) > 32:
        return False
    return all(type(number) is int and number >= 0 for number in value)


def _is_shape(value: object) -> TypeGuard[list[int]]:
    """One that numpy can make an array of, even where a length is 0."""
    return _is_numbers(value) and math.prod(max(length, 1) for length in value) < 1 << 59


def _damaged(path: Path, what: str) -> ModelFormatError:
    return ModelFormatError(f"{path} is a damaged safetensors file: {what}", remedy=FETCH_AGAIN)
