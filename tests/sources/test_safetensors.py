"""The safetensors reader against the library that defined the format: same tensors, never more lenient."""

from __future__ import annotations

import json
import os
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from safetensors.numpy import save, save_file

from octavo.errors import ModelFormatError
from octavo.sources.documents import MAX_DOCUMENT_BYTES
from octavo.sources.files import MappedFile
from octavo.sources.safetensors import SafeTensor, read_safetensors

SLOWEST_SECONDS = 2.0


def read(path: Path) -> dict[str, SafeTensor]:
    return read_safetensors(MappedFile.open(path))


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_the_library_wrote(tmp_path: Path):
    rng = np.random.default_rng(1)
    tensors = {
        name: rng.integers(0, 2 if dtype is np.bool_ else 100, (3, 4)).astype(dtype)
        for name, dtype in {
            "F64": np.float64,
            "F32": np.float32,
            "F16": np.float16,
            "I64": np.int64,
            "I32": np.int32,
            "I16": np.int16,
            "I8": np.int8,
            "U64": np.uint64,
            "U32": np.uint32,
            "U16": np.uint16,
            "U8": np.uint8,
            "BOOL": np.bool_,
        }.items()
    }
    tensors |= {"scalar": np.array(3.0, np.float32), "empty": np.zeros((0, 5), np.float32)}
    path = tmp_path / "all.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    found = read(path)
    assert set(found) == set(tensors)
    for name, values in tensors.items():
        mine = found[name]
        assert mine.shape == values.shape
        assert mine.nbytes == values.nbytes
        assert name in ("scalar", "empty") or mine.dtype == name.lower()
        stored = mine.read()
        assert not stored.flags.writeable
        assert stored.dtype == values.dtype
        np.testing.assert_array_equal(stored, values)


@pytest.mark.parametrize(
    ("name", "dtype", "bits"),
    [
        ("bf16", torch.bfloat16, torch.uint16),
        ("f8_e4m3", torch.float8_e4m3fn, torch.uint8),
        ("f8_e5m2", torch.float8_e5m2, torch.uint8),
    ],
)
def test_types_numpy_lacks_are_read_as_their_bits(
    tmp_path: Path, name: str, dtype: torch.dtype, bits: torch.dtype
):
    values = torch.linspace(-2, 2, 12).reshape(3, 4).to(dtype)
    path = tmp_path / "bits.safetensors"
    safetensors.torch.save_file({"t": values}, path)
    tensor = read(path)["t"]
    assert tensor.dtype == name
    np.testing.assert_array_equal(tensor.read(), values.view(bits).numpy())


def test_tensors_far_into_a_large_file_are_read(tmp_path: Path):
    """Offsets of gigabytes, in a file of holes."""
    skipped = 3 << 30
    header = {"a": entry("U8", (skipped,), (0, skipped)), "b": entry("F32", (2,), (skipped, skipped + 8))}
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        start = file.write(file_of(header))
        file.seek(start + skipped)
        file.write(np.array([1.5, -2.0], "<f4").tobytes())
    assert read(path)["b"].read().tolist() == [1.5, -2.0]


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path):
    path = tmp_path / "sparse.safetensors"
    count = 1 << 38
    path.write_bytes(file_of({"t": entry("U8", [count], [0, count])}))
    os.truncate(path, path.stat().st_size + count)  # a terabyte that is not there
    assert read(path)["t"].nbytes == count


BAD: dict[str, bytes] = {
    "too short for a length": b"\1\2\3",
    "header over the cap": struct.pack("<Q", MAX_DOCUMENT_BYTES + 1) + bytes(64),
    "header of 2^64 - 1 bytes": struct.pack("<Q", (1 << 64) - 1) + bytes(64),
    "header beyond the file": struct.pack("<Q", 1000) + b"{}",
    "no header": struct.pack("<Q", 0),
    "not JSON": file_of(b"{nonsense"),
    "not UTF-8": file_of(b'{"\xff": 1}'),
    "a list": file_of([]),
    "space before the brace": file_of(b" {}"),
    "nested deeply": file_of(b'{"a":' * 100_000),
    "lists nested deeply": file_of(b'{"a":' + b"[" * 100_000),
    "a number of 5,000 digits": file_of(b'{"a":' + b"9" * 5000 + b"}"),
    "millions of items": file_of(b'{"a":[' + b"1," * 2_000_001 + b"1]}"),
    "NaN": file_of(b'{"a": NaN}'),
    "duplicate tensor": file_of(
        b'{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x",
    ),
    "duplicate offsets": file_of(
        b'{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"data_offsets":[0,1]}}', b"x"
    ),
    "half a surrogate pair": file_of(b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
    "metadata no map": file_of({"__metadata__": []}),
    "metadata not text": file_of({"__metadata__": {"a": 1}}),
    "entry no object": file_of({"t": 5}, bytes(8)),
    "entry without offsets": file_of({"t": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "entry with more": file_of({"t": entry() | {"more": 1}}, bytes(8)),
    "unknown type": file_of({"t": entry("F31")}, bytes(8)),
    "type no text": file_of({"t": entry(["F32"])}, bytes(8)),
    "shape no list": file_of({"t": entry(shape=2)}, bytes(8)),
    "negative length": file_of({"t": entry(shape=[-2])}, bytes(8)),
    "length a fraction": file_of({"t": entry(shape=[2.0])}, bytes(8)),
    "length a boolean": file_of({"t": entry("U8", [True], [0, 1])}, b"x"),
    "length of 2^64": file_of({"t": entry(shape=[1 << 64])}, bytes(8)),
    "lengths overflow": file_of({"t": entry(shape=[1 << 40, 1 << 40])}, bytes(8)),
    "lengths overflow beside 0": file_of({"t": entry(shape=[1 << 40, 1 << 40, 0], offsets=[0, 0])}),
    "10,000 dimensions": file_of({"t": entry(shape=[1] * 10_000, offsets=[0, 4])}, bytes(4)),
    "one offset": file_of({"t": entry(offsets=[0])}, bytes(8)),
    "negative offset": file_of({"t": entry(offsets=[-8, 0])}, bytes(8)),
    "offsets swapped": file_of({"t": entry(offsets=[8, 0])}, bytes(8)),
    "offset beyond the file": file_of({"t": entry(offsets=[8, 16])}, bytes(8)),
    "extent larger than the shape": file_of({"t": entry(offsets=[0, 12])}, bytes(12)),
    "extent smaller than the shape": file_of({"t": entry(offsets=[0, 4])}, bytes(4)),
    "hole at the start": file_of({"t": entry(offsets=[4, 12])}, bytes(12)),
    "hole between": file_of({"t": entry(), "u": entry(offsets=[12, 20])}, bytes(20)),
    "hole at the end": file_of({"t": entry()}, bytes(12)),
    "overlap": file_of({"t": entry(), "u": entry(offsets=[4, 12])}, bytes(12)),
    "the same bytes twice": file_of({"t": entry(), "u": entry()}, bytes(8)),
    "data cut off": file_of({"t": entry()}, bytes(7)),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_files_are_refused(tmp_path: Path, case: str):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BAD[case])
    start = time.perf_counter()
    with pytest.raises(ModelFormatError) as caught:
        read(path)
    assert time.perf_counter() - start < SLOWEST_SECONDS
    assert str(path) in caught.value.message
    assert len(caught.value.message) < 1000


def test_the_builder_of_the_bad_files_can_make_a_good_one(tmp_path: Path):
    path = tmp_path / "good.safetensors"
    path.write_bytes(
        file_of({"__metadata__": {"a": "b"}, "t": entry(), "u": entry(offsets=[8, 16])}, bytes(16))
    )
    assert set(read(path)) == {"t", "u"}


@pytest.fixture
def outcome(tmp_path: Path) -> Callable[[bytes], tuple[bool, bool]]:
    """Whether we and the library read a mutant; anything of ours but ModelFormatError fails the test."""
    path = tmp_path / "mutant.safetensors"
    path.touch()

    def both(data: bytes) -> tuple[bool, bool]:
        with path.open("r+b") as file:
            file.write(data)
            file.truncate()
        start = time.perf_counter()
        try:
            for tensor in read(path).values():
                assert tensor.read().nbytes == tensor.nbytes
            ours = True
        except ModelFormatError:
            ours = False
        assert time.perf_counter() - start < SLOWEST_SECONDS
        try:
            safetensors.deserialize(data)
            theirs = True
        except safetensors.SafetensorError:
            theirs = False
        return ours, theirs

    return both


@pytest.fixture
def seed_bytes() -> bytes:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    return save({"a": values, "b": values[0], "c": values.astype(np.float16)}, metadata={"format": "pt"})


def test_truncated_files_are_refused(outcome, seed_bytes: bytes):
    for cut in np.linspace(1, len(seed_bytes) - 1, 100).astype(int):
        assert outcome(seed_bytes[:cut]) == (False, False)


def test_mutants_are_read_only_where_the_library_reads_them(outcome, seed_bytes: bytes):
    rng = random.Random(7)
    header_bytes = 8 + int.from_bytes(seed_bytes[:8], "little")
    digits = [i for i in range(8, header_bytes) if chr(seed_bytes[i]).isdigit()]
    read_by_both = 0
    for _ in range(3000):
        mutant = bytearray(seed_bytes)
        for _ in range(rng.randint(1, 3)):
            match rng.randrange(4):
                case 0:
                    mutant[rng.choice(digits)] = rng.choice(b"0123456789")
                case 1:
                    mutant[rng.randrange(header_bytes)] = rng.choice(b'0123456789,:[]{}" aF')
                case 2:
                    mutant[rng.randrange(header_bytes)] ^= 1 << rng.randrange(8)
                case 3:
                    position, length = rng.randrange(header_bytes), rng.randint(1, 12)
                    mutant[position : position + length] = b" " * length
        ours, theirs = outcome(bytes(mutant))
        assert theirs or not ours
        read_by_both += ours
    assert 0 < read_by_both < 3000
