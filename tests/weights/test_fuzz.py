"""Damaged weights, whole load path: read or refused by name; never a crash, a hang or memory without bound.

Header flips, cuts and 3,000 header mutants of each reader on its own stand in tests/sources.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

HERE = Path(__file__).parent
FIXTURES = HERE.parent / "quant" / "checkpoints"
TYPES = ("Q4_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "F16", "BF16")
SLOWEST_SECONDS = 2.0
MOST_BYTES = 256 << 20


def write_gguf(path: Path) -> None:
    """One small tensor of each type; float16 numbers of the blocks are made finite."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.add_token_list([f"token {i}" for i in range(20)])
    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
        raw = random.integers(0, 256, (2, 256 // elements * nbytes), np.uint8) & 0x3B
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.add_tensor("norm", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def survey(tmp_path: Path, kind: str, seed: str, count: int) -> None:
    path = tmp_path / f"seed.{kind}"
    config: list[str] = []
    if kind == "gguf":
        write_gguf(path)
    else:
        shutil.copy(FIXTURES / f"{seed}.safetensors", path)
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        config = [header["__metadata__"]["quantization_config"]]
    command = [sys.executable, "-W", "error", str(HERE / "fuzzing.py"), kind, str(path), str(count), *config]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["read"] + found["refused"] == count
    assert found["read"] > 0
    assert found["refused"] > count // 10
    assert found["slowest_seconds"] < SLOWEST_SECONDS, found
    assert found["peak_bytes"] < MOST_BYTES, found


@pytest.mark.parametrize(
    ("kind", "seed"), [("gguf", ""), ("safetensors", "gptq-4-act"), ("safetensors", "compressed-w4a16-zero")]
)
def test_mutants_are_read_or_refused(tmp_path: Path, kind: str, seed: str):
    survey(tmp_path, kind, seed, 400)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("kind", "seed"), [("gguf", ""), ("safetensors", "gptq-4"), ("safetensors", "compressed-float8-block")]
)
def test_a_hundred_thousand_mutants(tmp_path: Path, kind: str, seed: str):
    survey(tmp_path, kind, seed, 50_000 if kind == "gguf" else 25_000)
