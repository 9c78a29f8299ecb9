"""The shared library: its structs and functions as ctypes sees them (csrc/octavo_cpu.h), loaded once on demand."""

from __future__ import annotations

import ctypes
from ctypes import (
    POINTER,
    Structure,
    c_double,
    c_float,
    c_int16,
    c_int32,
    c_int64,
    c_uint32,
    c_uint64,
    c_void_p,
)
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from octavo.runners.cpu.build import LIBRARY

ABI = 5
IsaName = Literal["portable", "avx2", "avx512"]
ISA_NAMES: tuple[IsaName, ...] = get_args(IsaName)
"""Slowest first; the index is the library's number."""


class NativeUnavailableError(Exception):
    """There is no usable library. The message says why, and what to do."""


class Codec(IntEnum):
    PLAIN_F32 = 0
    PLAIN_F16 = 1
    PLAIN_BF16 = 2
    U8 = 3
    U8_MIN = 4
    U4 = 5
    U4_MIN = 6
    T4 = 7


class Numbers(IntEnum):
    """How a group's scale and minimum are stored: U8 and I8 times a float16 that 256 columns share, F9Z7 both in one
    word (`octavo.quant.scales.JOINT`)."""

    F16 = 0
    F32 = 1
    U8 = 2
    I8 = 3
    F9Z7 = 4


class NormKind(IntEnum):
    NONE = 0
    RMS = 1
    LAYERNORM = 2


class Activation(IntEnum):
    SILU = 0
    GELU = 1
    GELU_TANH = 2


class Table(Structure):
    _fields_ = (("values", c_float * 16), ("steps", c_int16 * 16), ("step", c_float))


class Matrix(Structure):
    _fields_ = (
        ("blocks", c_void_p),
        ("bias", c_void_p),
        ("table", POINTER(Table)),
        ("block_bytes", c_int64),
        ("rows", c_int32),
        ("columns", c_int32),
        ("codec", c_int32),
        ("numbers", c_int32),
        ("group", c_int32),
        ("int8_activations", c_int32),
    )


class Norm(Structure):
    _fields_ = (("gain", c_void_p), ("bias", c_void_p), ("kind", c_int32), ("eps", c_float))


class Expert(Structure):
    _fields_ = tuple((name, Matrix) for name in ("gate", "up", "down"))


class Layer(Structure):
    _fields_ = (
        *((name, Norm) for name in ("pre_mixer", "post_mixer", "pre_ffn", "post_ffn", "q_norm", "k_norm")),
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down", "router")),
        ("experts", POINTER(Expert)),
        ("residual_multiplier", c_float),
        ("score_scale", c_float),
        ("score_softcap", c_float),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("window", c_int32),
        ("rope", c_int32),
        ("qk_norm_full", c_int32),
        ("activation", c_int32),
        ("kv_group", c_int32),
        ("parallel", c_int32),
        ("expert_count", c_int32),
        ("experts_per_token", c_int32),
        ("normalized", c_int32),
    )


class Rope(Structure):
    _fields_ = (("inverse_frequencies", c_void_p), ("pairs", c_int32), ("attention_factor", c_float))


class Model(Structure):
    _fields_ = (
        ("embedding", Matrix),
        ("head", Matrix),
        ("final_norm", Norm),
        ("layers", POINTER(Layer)),
        ("ropes", POINTER(Rope)),
        ("kv_pages", POINTER(c_int32)),
        ("layer_count", c_int32),
        ("rope_count", c_int32),
        ("kv_groups", c_int32),
        ("vocab_size", c_int32),
        ("hidden_size", c_int32),
        ("embedding_multiplier", c_float),
        ("logits_multiplier", c_float),
        ("final_softcap", c_float),
        ("max_slots", c_int32),
        ("row_capacity", c_int32),
        ("isa", c_int32),
        ("threads", c_int32),
    )


class Addend(Structure):
    _fields_ = (("a", c_void_p), ("b", c_void_p), ("rank", c_int32), ("columns", c_int32), ("rows", c_int32))


class AdapterStruct(Structure):
    _fields_ = (("addends", POINTER(Addend)), ("rank", c_int32))


class SamplingStruct(Structure):
    _fields_ = (
        ("temperature", c_float),
        ("top_p", c_float),
        ("min_p", c_float),
        ("repetition_penalty", c_float),
        ("presence_penalty", c_float),
        ("frequency_penalty", c_float),
        ("seed", c_uint64),
        ("choice", c_uint32),
        ("top_k", c_int32),
        ("bias_ids", c_void_p),
        ("bias_values", c_void_p),
        ("bias_count", c_int32),
    )


class Logprobs(Structure):
    _fields_ = (("logprobs", c_void_p), ("top_ids", c_void_p), ("top_logprobs", c_void_p), ("top", c_int32))


class ChunkStruct(Structure):
    _fields_ = (
        ("token_ids", c_void_p),
        ("page_tables", POINTER(c_void_p)),
        ("targets", c_void_p),
        ("prompt", Logprobs),
        ("slot", c_int32),
        ("start", c_int32),
        ("tokens", c_int32),
        ("sample", c_int32),
        ("drafts", c_int32),
    )


class SampleStruct(Structure):
    _fields_ = (
        ("mask", c_void_p),
        ("logits", c_void_p),
        ("draft_ids", c_void_p),
        ("token_ids", c_void_p),
        ("logprobs", Logprobs),
        ("slot", c_int32),
        ("drafts", c_int32),
        ("tokens", c_int32),
    )


_STRUCTS = (
    *(Table, Matrix, Norm, Expert, Layer, Rope, Model),
    *(Addend, AdapterStruct, SamplingStruct, Logprobs, ChunkStruct, SampleStruct),
)


def load(path: Path) -> ctypes.CDLL:
    """The library at `path` with its functions declared. Raises NativeUnavailableError."""
    if not path.exists():
        raise NativeUnavailableError(
            "its kernels were not compiled when Octavo was installed: install a C++20 compiler (g++ or clang++) "
            "and reinstall Octavo"
        )
    try:
        library = ctypes.CDLL(str(path))
        _declare(library)
    except (OSError, AttributeError) as error:
        raise NativeUnavailableError(f"its kernels do not load ({error}): reinstall Octavo") from error
    found = (c_int32 * (1 + len(_STRUCTS)))()
    library.octavo_abi(found)
    if list(found) != [ABI, *map(ctypes.sizeof, _STRUCTS)]:
        raise NativeUnavailableError("its kernels are of another Octavo version: reinstall Octavo")
    return library


@cache
def native() -> ctypes.CDLL:
    """The package's own library. Raises NativeUnavailableError."""
    return load(LIBRARY)


def supported_isas() -> tuple[IsaName, ...]:
    """The instruction sets this machine runs, slowest first. Raises NativeUnavailableError."""
    library = native()
    return tuple(name for i, name in enumerate(ISA_NAMES) if library.octavo_isa_supported(i))


def read_bandwidth(threads: int, *, nbytes: int = 1 << 28, rounds: int = 5) -> float:
    """Bytes a second this machine reads from memory: the median of `rounds` passes over `nbytes`.

    Raises NativeUnavailableError, and MemoryError where there are not that many bytes.
    """
    found = (c_double * rounds)()
    if native().octavo_read_bandwidth(threads, nbytes, rounds, found) < 0:
        raise MemoryError(f"{nbytes} bytes to read")
    return float(sorted(found)[rounds // 2])


def _declare(library: ctypes.CDLL) -> None:
    pointer, integer = c_void_p, c_int32
    signatures: dict[str, tuple[type | None, list[type]]] = {
        "octavo_abi": (None, [POINTER(c_int32)]),
        "octavo_isa_supported": (integer, [integer]),
        "octavo_isa_lanes": (integer, [integer]),
        "octavo_open": (pointer, [POINTER(Model)]),
        "octavo_close": (None, [pointer]),
        "octavo_memory": (None, [pointer, POINTER(c_int64), POINTER(c_int64)]),
        "octavo_open_slot": (
            integer,
            [pointer, integer, POINTER(SamplingStruct), pointer, integer, integer, POINTER(AdapterStruct)],
        ),
        "octavo_close_slot": (None, [pointer, integer]),
        "octavo_forward": (integer, [pointer, POINTER(ChunkStruct), integer]),
        "octavo_logits": (POINTER(c_float), [pointer, integer]),
        "octavo_sample": (integer, [pointer, POINTER(SampleStruct), integer]),
        "octavo_read_bandwidth": (integer, [integer, c_int64, integer, POINTER(c_double)]),
        "octavo_test_linear": (integer, [integer, POINTER(Matrix), pointer, integer, pointer]),
        "octavo_test_row": (integer, [integer, POINTER(Matrix), integer, pointer]),
        "octavo_test_norm": (None, [integer, POINTER(Norm), pointer, integer, pointer]),
        "octavo_test_activate": (None, [integer, pointer, integer, integer]),
        "octavo_test_sample": (
            integer,
            [
                integer,
                POINTER(SamplingStruct),
                pointer,
                integer,
                pointer,
                integer,
                integer,
                POINTER(SampleStruct),
            ],
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
