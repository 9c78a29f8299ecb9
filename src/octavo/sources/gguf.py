"""A bounded reader of GGUF files (versions 2 and 3, little endian): metadata and lazy tensors.

Format: docs/gguf.md of ggml. The file is mapped; every count, length and offset is checked against the
bytes that remain before anything is allocated, and whatever is wrong raises ModelFormatError with the byte
it stands at. What the metadata mean is gguf_config.py's and gguf_model.py's work.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from octavo.errors import ModelFormatError
from octavo.sources.files import FETCH_AGAIN, MappedFile
from octavo.sources.ggml_types import GGML_TYPES, GGMLType

MAX_HEADER_BYTES = 64 << 20
"""Real headers, which hold the vocabulary, stay below 25 MB."""
MAX_ARRAY_ELEMENTS = 3 << 19
"""In all arrays of a file together. The largest vocabularies (262,144 tokens with scores and types, 514,906
merges) need 1.3 million."""
MAX_ENTRIES = 1 << 16
"""Metadata keys, and tensors."""
_MAX_NAME_BYTES = (1 << 16) - 1
_MAX_DIMENSIONS = 4

_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<B"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
_U64 = struct.Struct("<Q")
_MIN_ENTRY_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A `TensorRef` of a GGUF file."""

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    nbytes: int
    file: MappedFile
    offset: int
    """In the file, in bytes."""

    @property
    def dtype(self) -> str:
        return self.type.name

    def read(self) -> np.ndarray:
        """Stored values of `shape`, read-only; block types as uint8 of [..., bytes a row]."""
        flat = self.file.array(self.offset, self.nbytes, self.type.dtype)
        return flat.reshape(*self.shape[:-1], -1)


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """What a GGUF file says before its tensors' values."""

    path: Path
    file: MappedFile
    metadata: Mapping[str, Any]
    """Numbers, booleans, strings, and lists of one of them."""
    tensors: Mapping[str, GGUFTensor]
    header_bytes: int
    """Bytes of everything but the tensors' values."""

    @property
    def header(self) -> bytes:
        return self.file.data[: self.header_bytes]


def read_gguf(path: Path) -> GGUFFile:
    """Map a GGUF file and read its header. A file without tensors (a vocabulary) is fine here.

    Raises ModelFormatError for whatever is malformed, and as `open_regular`.
    """
    file = MappedFile.open(path)
    cursor = _Cursor(file)
    cursor.magic()
    tensor_count = cursor.count("tensors", _MIN_TENSOR_BYTES, MAX_ENTRIES)
    entry_count = cursor.count("metadata entries", _MIN_ENTRY_BYTES, MAX_ENTRIES)
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = cursor.string("a metadata key", _MAX_NAME_BYTES)
        if key in metadata:
            cursor.fail(f"the metadata key {key!r:.100} stands in it twice")
        metadata[key] = cursor.value(key)
    tensors = _tensors(cursor, tensor_count, _alignment(cursor, metadata))
    return GGUFFile(path, file, metadata, tensors, cursor.position)


def _alignment(cursor: _Cursor, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        cursor.fail(f"general.alignment is {alignment!r:.40}; expected a power of two")
    return alignment


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, GGUFTensor]:
    described: dict[str, tuple[GGMLType, tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = cursor.string("a tensor's name", _MAX_NAME_BYTES)
        if name in described:
            cursor.fail(f"the tensor {name!r:.100} stands in it twice")
        described[name] = _tensor(cursor, name, alignment)
    size = cursor.file.size_bytes
    data_start = -(-cursor.position // alignment) * alignment
    tensors = {}
    for name, (kind, shape, nbytes, offset) in described.items():
        start = data_start + offset
        if start + nbytes > size:
            cursor.fail(
                f"the tensor {name!r:.100} takes bytes {start:,} to {start + nbytes:,}, "
                f"but the file ends at {size:,}"
            )
        tensors[name] = GGUFTensor(name, kind, shape, nbytes, cursor.file, start)
    in_order = sorted(tensors.values(), key=lambda tensor: tensor.offset)
    for one, other in itertools.pairwise(in_order):
        if one.offset + one.nbytes > other.offset:
            cursor.fail(f"the tensors {one.name!r:.100} and {other.name!r:.100} overlap")
    return tensors


def _tensor(cursor: _Cursor, name: str, alignment: int) -> tuple[GGMLType, tuple[int, ...], int, int]:
    """Type, shape (row-major), bytes, and offset in the data section."""
    dimensions = cursor.scalar(_UINT32, "a tensor's dimensions")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        cursor.fail(f"the tensor {name!r:.100} has {dimensions} dimensions; expected 1 to {_MAX_DIMENSIONS}")
    lengths = [cursor.u64("a tensor's shape") for _ in range(dimensions)]
    if 0 in lengths:
        cursor.fail(f"the tensor {name!r:.100} has a dimension of length 0")
    number = cursor.scalar(_UINT32, "a tensor's type")
    kind = GGML_TYPES.get(number)
    if kind is None:
        cursor.fail(f"the tensor {name!r:.100} is of the unknown type {number}")
    row = lengths[0]
    if row % kind.block_elements:
        cursor.fail(
            f"rows of the tensor {name!r:.100} have {row} elements, "
            f"no multiple of the {kind.block_elements} of a {kind.name} block"
        )
    nbytes = row // kind.block_elements * kind.block_bytes
    for length in lengths[1:]:
        nbytes *= length
    offset = cursor.u64("a tensor's offset")
    if offset % alignment:
        cursor.fail(f"the offset {offset} of the tensor {name!r:.100} is no multiple of {alignment}")
    return kind, tuple(reversed(lengths)), nbytes, offset


class _Cursor:
    """Reads forward through the header and never past its end."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.position = 0
        self._data = file.data
        self._end = min(file.size_bytes, MAX_HEADER_BYTES)
        self._elements_left = MAX_ARRAY_ELEMENTS

    def fail(self, what: str) -> NoReturn:
        raise ModelFormatError(
            f"{self.file.path} is a damaged GGUF file: {what} (near byte {self.position:,})",
            remedy=FETCH_AGAIN,
        )

    def take(self, nbytes: int, what: str) -> int:
        """Step over `nbytes`; returns where they start."""
        start = self.position
        if nbytes > self._end - start:
            if self._end < self.file.size_bytes:
                self.fail(f"its header goes on for more than {MAX_HEADER_BYTES:,} bytes, inside {what}")
            self.fail(
                f"it ends inside {what}, which needs {nbytes:,} bytes where {self._end - start:,} are left"
            )
        self.position = start + nbytes
        return start

    def magic(self) -> None:
        if self._data[:4] != b"GGUF":
            raise ModelFormatError(
                f"{self.file.path} is not a GGUF file: it starts with {self._data[:4]!r}",
                remedy="Name a .gguf file, a folder with safetensors, or a hub id.",
            )
        self.position = 4
        version = self.scalar(_UINT32, "the version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            raise ModelFormatError(
                f"{self.file.path} is "
                + ("big-endian GGUF" if swapped else f"GGUF version {version}; versions 2 and 3 can be read"),
                remedy="Convert the model again with a current llama.cpp, for a little-endian machine.",
            )

    def u64(self, what: str) -> int:
        value: int = _U64.unpack_from(self._data, self.take(8, what))[0]
        return value

    def count(self, what: str, least_bytes: int, most: int) -> int:
        """A number of things that take at least `least_bytes` each."""
        count = self.u64(f"the number of {what}")
        if count > most:
            self.fail(f"it claims {count:,} {what}; at most {most:,} are read")
        if count * least_bytes > self._end - self.position:
            self.fail(f"it claims {count:,} {what} but only {self._end - self.position:,} bytes are left")
        return count

    def scalar(self, kind: int, what: str) -> Any:
        layout = _SCALARS[kind]
        value = layout.unpack_from(self._data, self.take(layout.size, what))[0]
        if kind == _BOOL:
            if value > 1:
                self.fail(f"{what} is the boolean {value}")
            return value == 1
        return value

    def string(self, what: str, most_bytes: int = MAX_HEADER_BYTES) -> str:
        length = self.u64(what)
        if length > most_bytes:
            self.fail(f"{what} is {length:,} bytes long; at most {most_bytes:,} are read")
        start = self.take(length, what)
        return self._decode(start, length, what)

    def _decode(self, start: int, length: int, what: str) -> str:
        try:
            return str(self._data[start : start + length], "utf-8")
        except UnicodeDecodeError as error:
            self.position = start + error.start
            self.fail(f"{what} is not UTF-8")

    def value(self, key: str) -> Any:
        what = f"the value of {key!r:.100}"
        kind = self.scalar(_UINT32, what)
        if kind == _STRING:
            return self.string(what)
        if kind in _SCALARS:
            return self.scalar(kind, what)
        if kind != _ARRAY:
            self.fail(f"{what} is of the unknown type {kind}")
        kind = self.scalar(_UINT32, what)
        if kind == _ARRAY:
            self.fail(f"{what} is an array of arrays, which no model needs")
        if kind != _STRING and kind not in _SCALARS:
            self.fail(f"{what} is an array of the unknown type {kind}")
        least_bytes = 8 if kind == _STRING else _SCALARS[kind].size
        count = self.count(f"elements in {what}", least_bytes, self._elements_left)
        self._elements_left -= count
        return self._strings(count, what) if kind == _STRING else self._numbers(kind, count, what)

    def _numbers(self, kind: int, count: int, what: str) -> list[Any]:
        layout = _SCALARS[kind]
        start = self.take(count * layout.size, what)
        array = np.frombuffer(self._data, np.dtype(layout.format), count, start)
        if kind == _BOOL:
            if (array > 1).any():
                self.fail(f"{what} has a boolean that is neither 0 nor 1")
            array = array.astype(bool)
        numbers: list[Any] = array.tolist()
        return numbers

    def _strings(self, count: int, what: str) -> list[str]:
        """As `string`, `count` times; the loop is written out because vocabularies have 100,000s of them."""
        data, end, position, length_at = self._data, self._end, self.position, _U64.unpack_from
        result: list[str] = []
        append, start = result.append, position
        try:
            for _ in range(count):
                start = position + 8
                if start > end:
                    break
                position = start + length_at(data, position)[0]
                if position > end:
                    break
                append(data[start:position].decode())
        except UnicodeDecodeError:
            self._decode(start, position - start, what)
        if len(result) != count:
            self.fail(f"it ends inside {what}, after {len(result):,} of {count:,} strings")
        self.position = position
        return result
