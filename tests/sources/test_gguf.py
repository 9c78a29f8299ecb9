"""The GGUF reader: what the gguf package reads, and nothing but ModelFormatError for what is malformed."""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from octavo.errors import ModelFormatError, ModelNotFoundError, UnsafeFileError
from octavo.sources.ggml_types import GGML_TYPES
from octavo.sources.gguf import MAX_ARRAY_ELEMENTS, MAX_ENTRIES, MAX_HEADER_BYTES, read_gguf

F32, Q4_1, U8, BOOL, STRING, ARRAY, U32, F32_VALUE = 0, 3, 0, 7, 8, 9, 4, 6
SLOWEST_SECONDS = 2.0


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def assert_same_as_package(path: Path) -> None:
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    fields = {key: value for key, value in theirs.fields.items() if not key.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for key, value in fields.items():
        assert ours.metadata[key] == value.contents(), key
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.dtype == tensor.tensor_type.name.lower()
        assert mine.shape == tuple(int(length) for length in reversed(tensor.shape))
        assert mine.nbytes == tensor.n_bytes
        read = mine.read()
        assert not read.flags.writeable
        assert read.tobytes() == tensor.data.tobytes()
        if mine.type.block_elements == 1:
            assert read.shape == mine.shape
        else:
            assert read.dtype == np.uint8
            assert read.shape == (*mine.shape[:-1], mine.nbytes // int(np.prod(mine.shape[:-1])))


def test_types_are_those_of_the_gguf_package():
    theirs = {
        int(kind): (kind.name.lower(), *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType
    }
    ours = {number: (kind.name, kind.block_elements, kind.block_bytes) for number, kind in GGML_TYPES.items()}
    assert ours == theirs


def test_reads_every_value_and_tensor_type(tmp_path: Path):
    path = tmp_path / "all.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -5)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -6000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", (1 << 64) - 1)
    writer.add_int64("i64", -(1 << 63))
    writer.add_float32("f32", 0.1)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_string("text", "größer 🦑")
    for key, values in (
        ("bools", [True, False]),
        ("ints", [-1, 2, -3]),
        ("floats", [0.5, -0.25]),
        ("texts", ["", "a", "é", "🦑"]),
    ):
        writer.add_array(key, values)
    rng = np.random.default_rng(1)
    values = rng.standard_normal((6, 256)).astype(np.float32)
    writer.add_tensor("f32", values)
    writer.add_tensor("f16", values.astype(np.float16))
    writer.add_tensor("f64", values.astype(np.float64))
    writer.add_tensor("vector", values[0])
    writer.add_tensor("cube", values.reshape(2, 3, 256))
    writer.add_tensor("i32", np.arange(5, dtype=np.int32))
    for kind in (
        gguf.GGMLQuantizationType.BF16,
        gguf.GGMLQuantizationType.Q8_0,
        gguf.GGMLQuantizationType.Q4_1,
    ):
        writer.add_tensor(kind.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    kind = gguf.GGMLQuantizationType.Q4_K
    writer.add_tensor(kind.name, rng.integers(0, 256, (6, 144), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_same_as_package(path)
    bf16 = read_gguf(path).tensors["BF16"].read()
    assert bf16.dtype == np.uint16
    decoded = (bf16.astype(np.uint32) << 16).view(np.float32)
    assert np.abs(decoded - values).max() < 0.02


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_honours_alignment(tmp_path: Path, alignment: int):
    path = tmp_path / "aligned.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    writer.add_tensor("one", np.arange(3, dtype=np.float32))
    writer.add_tensor("two", np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_same_as_package(path)


def test_reads_version_2(tmp_path: Path, raw_gguf):
    path = tmp_path / "two.gguf"
    raw = raw_gguf(version=2, data=bytes(64)).tensor("t", [16], F32, 0)
    path.write_bytes(raw.bytes())
    assert read_gguf(path).tensors["t"].shape == (16,)


@pytest.mark.model
def test_default_model_is_read_as_by_the_gguf_package(default_model_path: Path):
    assert_same_as_package(default_model_path)


def test_a_large_vocabulary_is_read_fast(tmp_path: Path):
    path = tmp_path / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([f"token{i}" for i in range(49_152)])
    writer.add_token_merges([f"left{i} right{i}" for i in range(48_900)])
    writer.add_token_types([1] * 49_152)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        read_gguf(path)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3


# --- malformed files ------------------------------------------------------------------------------------

BAD: dict[str, tuple[Callable, str]] = {
    "wrong magic": (lambda g: g(magic=b"GGML"), "not a GGUF file"),
    "version 0": (lambda g: g(version=0), "version 0"),
    "version 1": (lambda g: g(version=1), "version 1"),
    "version 4": (lambda g: g(version=4), "version 4"),
    "big endian": (lambda g: g(version=3 << 24), "big-endian"),
    "entry count too large": (lambda g: g(entry_count=1 << 63), "metadata entries"),
    "entry count beyond the file": (lambda g: g(entry_count=1000), "bytes are left"),
    "entry count over the cap": (lambda g: g(entry_count=MAX_ENTRIES + 1, data=bytes(1 << 20)), "at most"),
    "tensor count too large": (lambda g: g(tensor_count=(1 << 64) - 1), "tensors"),
    "tensor count beyond the file": (lambda g: g(tensor_count=5), "bytes are left"),
    "key length": (lambda g: g(entries=[u64(1 << 62) + bytes(64)], entry_count=1), "metadata key"),
    "key length over the cap": (lambda g: g(entries=[u64(1 << 17)], data=bytes(1 << 18)), "at most 65,535"),
    "key not UTF-8": (lambda g: g().entry(b"\xff\xfe", U8, b"\1"), "not UTF-8"),
    "duplicate key": (lambda g: g().entry("k", U8, b"\1").entry("k", U8, b"\1"), "twice"),
    "unknown value type": (lambda g: g().entry("k", 13, bytes(8)), "unknown type 13"),
    "value cut off": (lambda g: g(alignment=1).entry("k", 12, bytes(4)), "ends inside"),
    "boolean 2": (lambda g: g().entry("k", BOOL, b"\2"), "boolean"),
    "boolean array": (lambda g: g().array("k", BOOL, 2, b"\1\7"), "boolean"),
    "string length": (lambda g: g().entry("k", STRING, u64((1 << 64) - 1)), "bytes long"),
    "string beyond the file": (lambda g: g().entry("k", STRING, u64(4096)), "ends inside"),
    "string not UTF-8": (lambda g: g().entry("k", STRING, u64(2) + b"\xc3\x28"), "not UTF-8"),
    "surrogate as UTF-8": (lambda g: g().entry("k", STRING, u64(3) + b"\xed\xa0\x80"), "not UTF-8"),
    "array of arrays": (lambda g: g().array("k", ARRAY, 1, u32(U8) + u64(1) + b"\1"), "array of arrays"),
    "array of unknown type": (lambda g: g().array("k", 99, 1, bytes(8)), "unknown type 99"),
    "array count": (lambda g: g().array("k", U8, (1 << 64) - 1, bytes(8)), "elements"),
    "array count overflows": (lambda g: g().array("k", 10, 1 << 61, bytes(8)), "elements"),
    "array over the cap": (lambda g: g().array("k", U8, MAX_ARRAY_ELEMENTS + 1, bytes(1 << 22)), "at most"),
    "arrays over the cap together": (
        lambda g: (
            g()
            .array("a", U8, MAX_ARRAY_ELEMENTS // 2 + 1, bytes(MAX_ARRAY_ELEMENTS // 2 + 1))
            .array("b", U8, MAX_ARRAY_ELEMENTS // 2, bytes(MAX_ARRAY_ELEMENTS // 2))
        ),
        "at most",
    ),
    "strings cut off": (lambda g: g(alignment=1).array("k", STRING, 2, u64(8) + bytes(8)), "of 2 strings"),
    "strings beyond the file": (
        lambda g: g().array("k", STRING, 2, u64(1 << 63) + bytes(64)),
        "of 2 strings",
    ),
    "strings not UTF-8": (lambda g: g().array("k", STRING, 1, u64(1) + b"\x80"), "not UTF-8"),
    "alignment 0": (lambda g: g().entry("general.alignment", U32, u32(0)), "power of two"),
    "alignment 3": (lambda g: g().entry("general.alignment", U32, u32(3)), "power of two"),
    "alignment a float": (lambda g: g().entry("general.alignment", F32_VALUE, bytes(4)), "power of two"),
    "alignment huge": (
        lambda g: g(data=bytes(64)).entry("general.alignment", U32, u32(1 << 31)).tensor("t", [4], F32, 0),
        "the file ends at",
    ),
    "tensor name not UTF-8": (lambda g: g(data=bytes(64)).tensor(b"\xff", [4], F32, 0), "not UTF-8"),
    "duplicate tensor": (
        lambda g: g(data=bytes(64)).tensor("t", [4], F32, 0).tensor("t", [4], F32, 32),
        "twice",
    ),
    "no dimensions": (lambda g: g(data=bytes(64)).tensor("t", [], F32, 0), "0 dimensions"),
    "5 dimensions": (lambda g: g(data=bytes(64)).tensor("t", [1] * 5, F32, 0), "5 dimensions"),
    "2^32 - 1 dimensions": (lambda g: g().tensor("t", [1], F32, 0, dimensions=(1 << 32) - 1), "dimensions"),
    "length 0": (lambda g: g(data=bytes(64)).tensor("t", [4, 0], F32, 0), "length 0"),
    "lengths overflow": (lambda g: g(data=bytes(64)).tensor("t", [1 << 63, 1 << 63], F32, 0), "file ends at"),
    "negative length": (lambda g: g(data=bytes(64)).tensor("t", [(1 << 64) - 1], F32, 0), "file ends at"),
    "unknown tensor type": (lambda g: g(data=bytes(64)).tensor("t", [4], 4, 0), "unknown type 4"),
    "type 2^32 - 1": (lambda g: g(data=bytes(64)).tensor("t", [4], (1 << 32) - 1, 0), "unknown type"),
    "row no multiple of the block": (lambda g: g(data=bytes(64)).tensor("t", [33], Q4_1, 0), "no multiple"),
    "offset not aligned": (lambda g: g(data=bytes(64)).tensor("t", [4], F32, 4), "no multiple of 32"),
    "offset beyond the file": (lambda g: g(data=bytes(64)).tensor("t", [4], F32, 1 << 20), "file ends at"),
    "offset overflows": (lambda g: g(data=bytes(64)).tensor("t", [4], F32, (1 << 64) - 32), "file ends at"),
    "data cut off": (lambda g: g(data=bytes(60)).tensor("t", [16], F32, 0), "file ends at"),
    "no data": (lambda g: g().tensor("t", [16], F32, 0), "file ends at"),
    "overlap": (
        lambda g: g(data=bytes(96)).tensor("t", [16], F32, 0).tensor("u", [16], F32, 32),
        "overlap",
    ),
    "same place": (lambda g: g(data=bytes(64)).tensor("t", [4], F32, 0).tensor("u", [4], F32, 0), "overlap"),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_files_are_refused(tmp_path: Path, raw_gguf, case: str):
    make, says = BAD[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(make(raw_gguf).bytes())
    start = time.perf_counter()
    with pytest.raises(ModelFormatError) as caught:
        read_gguf(path)
    assert time.perf_counter() - start < SLOWEST_SECONDS
    assert says in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.remedy


def test_the_builder_of_the_bad_files_can_make_a_good_one(tmp_path: Path, raw_gguf):
    path = tmp_path / "good.gguf"
    raw = raw_gguf(data=bytes(96)).entry("k", BOOL, b"\1").array("a", STRING, 1, u64(1) + b"x")
    path.write_bytes(raw.tensor("t", [16], F32, 0).tensor("u", [8], F32, 64).bytes())
    found = read_gguf(path)
    assert found.metadata == {"k": True, "a": ["x"]}
    assert [tensor.read().shape for tensor in found.tensors.values()] == [(16,), (8,)]


def test_a_header_over_the_cap_is_refused_before_it_is_read(tmp_path: Path, raw_gguf):
    path = tmp_path / "large.gguf"
    data = raw_gguf().entry("k", STRING, u64(MAX_HEADER_BYTES - 16)).bytes()
    path.write_bytes(data)
    os.truncate(path, MAX_HEADER_BYTES * 2)  # sparse
    with pytest.raises(ModelFormatError, match="goes on for more than"):
        read_gguf(path)


@pytest.mark.parametrize("size", [0, 1, 3, 4, 7, 23])
def test_tiny_files_are_refused(tmp_path: Path, size: int):
    path = tmp_path / "tiny.gguf"
    path.write_bytes((b"GGUF" + u32(3) + bytes(16))[:size])
    with pytest.raises(ModelFormatError):
        read_gguf(path)


def survives(path: Path, data: bytes) -> bool:
    """Whether a mutant is read; anything but success and ModelFormatError fails the test."""
    with path.open("r+b") as file:  # ext4 makes emptying and writing anew 50 times slower
        file.write(data)
        file.truncate()
    start = time.perf_counter()
    try:
        for tensor in read_gguf(path).tensors.values():
            tensor.read().sum(dtype=np.float64)
        return True
    except ModelFormatError:
        return False
    finally:
        assert time.perf_counter() - start < SLOWEST_SECONDS


@pytest.fixture
def seed_file(write_gguf) -> tuple[Path, bytes, int]:
    """A small valid file, its bytes, and where its header ends."""
    values = np.linspace(-1, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    path = write_gguf(
        tensors={"blk.0.attn_q.weight": values, "blk.0.attn_k.weight": values},
        stored={"blk.0.attn_q.weight": gguf.GGMLQuantizationType.Q4_1},
    )
    return path, path.read_bytes(), read_gguf(path).header_bytes


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # sums of mutated floats
def test_truncated_files_are_refused(seed_file):
    path, data, _ = seed_file
    for cut in np.linspace(0, len(data) - 33, 100).astype(int):  # up to 32 bytes at the end are padding
        assert not survives(path, data[:cut]), f"cut at {cut}"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_header_byte_flipped(seed_file):
    path, data, header_bytes = seed_file
    read = 0
    for position in range(header_bytes):
        mutant = bytearray(data)
        mutant[position] ^= 0xFF
        read += survives(path, bytes(mutant))
    assert 0 < read < header_bytes  # a changed number may be fine, a changed length is not


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_mutants_are_read_or_refused(seed_file):
    path, data, header_bytes = seed_file
    rng = random.Random(7)
    interesting = (0, 1, 0x7F, 0x80, 0xFF)
    read = 0
    for _ in range(3000):
        mutant = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            position = rng.randrange(header_bytes)
            match rng.randrange(4):
                case 0:
                    mutant[position] = rng.choice(interesting)
                case 1:
                    mutant[position] ^= 1 << rng.randrange(8)
                case 2:
                    mutant[position : position + 8] = u64(rng.choice((0, 1, 1 << 31, 1 << 40, (1 << 64) - 1)))
                case 3:
                    length = rng.randint(1, 16)
                    if rng.random() < 0.5:
                        del mutant[position : position + length]
                    else:
                        mutant[position:position] = rng.randbytes(length)
        read += survives(path, bytes(mutant))
    assert 0 < read < 3000


# --- what is no file, and files that change -------------------------------------------------------------


def test_a_fifo_is_refused_at_once(tmp_path: Path):
    path = tmp_path / "pipe.gguf"
    os.mkfifo(path)
    with pytest.raises(UnsafeFileError, match="FIFO"):
        read_gguf(path)


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null"])
def test_a_device_is_refused(name: str):
    with pytest.raises(UnsafeFileError, match="device"):
        read_gguf(Path(name))


def test_a_missing_file_is_not_found(tmp_path: Path):
    with pytest.raises(ModelNotFoundError, match="cannot read"):
        read_gguf(tmp_path / "none.gguf")


def test_a_file_cut_short_after_it_was_opened_is_refused_not_a_crash(seed_file):
    path, _, header_bytes = seed_file
    tensors = read_gguf(path).tensors
    os.truncate(path, header_bytes)
    with pytest.raises(ModelFormatError, match="written to"):
        tensors["blk.0.attn_k.weight"].read()


def test_a_file_replaced_by_another_is_still_the_one_that_was_opened(seed_file):
    path, data, _ = seed_file
    tensor = read_gguf(path).tensors["blk.0.attn_k.weight"]
    other = path.with_suffix(".new")
    other.write_bytes(bytes(len(data)))
    os.replace(other, path)
    assert tensor.read().any()
