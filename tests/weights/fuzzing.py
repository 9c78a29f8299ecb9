"""Damaged checkpoints by the thousand, in a process of their own: prints what became of them as JSON.

    python fuzzing.py KIND SEED_FILE MUTANTS [CONFIG]

Each mutant is read as a load reads it: header, quantized modules, every tensor taken apart and dequantized.
Shared by the quick test and the soak of test_fuzz.py; `peak_bytes` is what it took beyond the first read.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from octavo.errors import IncompatibleModelError
from octavo.quant import split_stored
from octavo.quant.checkpoint import PackedTensor, open_quantized
from octavo.quant.stored import require_stored_format
from octavo.sources.files import MappedFile
from octavo.sources.gguf import read_gguf
from octavo.sources.safetensors import read_safetensors
from octavo.types import ModelSource, TensorRef

_NUMBERS = (0, 1, 31, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, (1 << 64) - 1)
_PLAIN_INTEGERS = frozenset("i8 i16 i32 i64 u8 u16 u32 u64 bool f64".split())


def load(path: Path, kind: str, config: Mapping[str, Any]) -> None:
    """Raises IncompatibleModelError (ModelFormatError above all) where the file cannot be used."""
    tensors: Mapping[str, TensorRef]
    tensors = read_gguf(path).tensors if kind == "gguf" else read_safetensors(MappedFile.open(path))
    source = ModelSource("f", None, "gguf", {"quantization_config": config}, {}, None, None, tensors, "f")
    for tensor in open_quantized(source).tensors.values():
        if isinstance(tensor, PackedTensor):
            tensor.read()
        elif tensor.dtype not in _PLAIN_INTEGERS:
            stored = require_stored_format(tensor.dtype, tensor.name)
            raw = tensor.read()
            raw = raw.reshape(-1, raw.shape[-1] if raw.ndim else 1)
            columns = tensor.shape[-1] if tensor.shape else 1
            stored.unpack(split_stored(tensor.dtype, raw, columns), columns)


def mutant_of(data: bytes, header_bytes: int, rng: random.Random) -> bytes:
    """A cut, a splice, or a few bytes, bits or numbers changed; most of them in the header."""
    mutant = bytearray(data)
    if rng.random() < 0.1:
        return bytes(mutant[: rng.randrange(len(mutant))])
    for _ in range(rng.randint(1, 4)):
        end = header_bytes if rng.random() < 0.8 else len(data)
        position = rng.randrange(min(end, len(mutant) - 16))
        match rng.randrange(6):
            case 0:
                mutant[position] = rng.randrange(256)
            case 1:
                mutant[position] ^= 1 << rng.randrange(8)
            case 2:
                mutant[position : position + 8] = rng.choice(_NUMBERS).to_bytes(8, "little")
            case 3:
                mutant[position] = rng.choice(b'0123456789[]{},:"')
            case 4:
                del mutant[position : position + rng.randint(1, 16)]
            case 5:
                mutant[position:position] = rng.randbytes(rng.randint(1, 16))
    return bytes(mutant)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def survey(
    next_mutant: Callable[[], bytes], count: int, path: Path, load_it: Callable[[], None]
) -> dict[str, Any]:
    outcomes = {"read": 0, "refused": 0}
    slowest = 0.0
    for _ in range(count):
        with path.open("r+b") as file:  # ext4 makes emptying and writing anew 50 times slower
            file.write(next_mutant())
            file.truncate()
        start = time.perf_counter()
        try:
            load_it()
            outcomes["read"] += 1
        except IncompatibleModelError:
            outcomes["refused"] += 1
        slowest = max(slowest, time.perf_counter() - start)
    return outcomes | {"slowest_seconds": slowest}


def main() -> None:
    np.seterr(all="ignore")  # what mutated floats overflow to is no matter here
    kind, seed, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    config = json.loads(sys.argv[4]) if len(sys.argv) > 4 else {}
    data, rng = seed.read_bytes(), random.Random(count)
    path = seed.with_suffix(".mutant" + seed.suffix)
    path.write_bytes(data)
    load(path, kind, config)  # the seed itself is good
    before = peak_bytes()
    header = read_gguf(seed).header_bytes if kind == "gguf" else 8 + int.from_bytes(data[:8], "little")
    found = survey(lambda: mutant_of(data, header, rng), count, path, lambda: load(path, kind, config))
    print(json.dumps(found | {"peak_bytes": peak_bytes() - before}))


if __name__ == "__main__":
    main()
