"""Builders of the small files these tests read: GGUF through the gguf package, and byte by byte."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

U32, STRING, ARRAY = 4, 8, 9


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


@dataclass
class RawGGUF:
    """A GGUF file as its fields, so that a test can get any one of them wrong."""

    magic: bytes = b"GGUF"
    version: int = 3
    entries: list[bytes] = field(default_factory=list)
    tensors: list[bytes] = field(default_factory=list)
    data: bytes = b""
    entry_count: int | None = None
    tensor_count: int | None = None
    alignment: int = 32

    def entry(self, key: str | bytes, kind: int, value: bytes) -> RawGGUF:
        self.entries.append(text(key) + struct.pack("<I", kind) + value)
        return self

    def array(self, key: str, kind: int, count: int, values: bytes) -> RawGGUF:
        return self.entry(key, ARRAY, struct.pack("<IQ", kind, count) + values)

    def tensor(
        self, name: str | bytes, shape: list[int], kind: int, offset: int, dimensions: int | None = None
    ) -> RawGGUF:
        head = struct.pack("<I", len(shape) if dimensions is None else dimensions)
        lengths = b"".join(struct.pack("<Q", length) for length in shape)
        self.tensors.append(text(name) + head + lengths + struct.pack("<IQ", kind, offset))
        return self

    def bytes(self) -> bytes:
        tensor_count = len(self.tensors) if self.tensor_count is None else self.tensor_count
        entry_count = len(self.entries) if self.entry_count is None else self.entry_count
        head = self.magic + struct.pack("<IQQ", self.version, tensor_count, entry_count)
        head += b"".join(self.entries) + b"".join(self.tensors)
        return head + bytes(-len(head) % self.alignment) + self.data


@pytest.fixture
def raw_gguf() -> type[RawGGUF]:
    return RawGGUF


WriteGGUF = Callable[..., Path]


@pytest.fixture
def write_gguf(tmp_path: Path) -> WriteGGUF:
    """Writes a tiny llama through the gguf package: metadata can be changed (None leaves a key out).

    With `split_tensors`, parts of so many tensors each, of which the first is returned.
    """

    def write(
        name: str = "tiny.gguf",
        *,
        architecture: str = "llama",
        metadata: Mapping[str, Any] | None = None,
        tensors: Mapping[str, np.ndarray] | None = None,
        stored: Mapping[str, gguf.GGMLQuantizationType] | None = None,
        split_tensors: int = 0,
    ) -> Path:
        entries: dict[str, Any] = {
            f"{architecture}.context_length": 128,
            f"{architecture}.embedding_length": 64,
            f"{architecture}.block_count": 2,
            f"{architecture}.feed_forward_length": 96,
            f"{architecture}.attention.head_count": 4,
            f"{architecture}.attention.head_count_kv": 2,
            f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.tokens": [f"t{i}" for i in range(40)],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        }
        entries |= metadata or {}
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_tensors)
        for key, value in entries.items():
            add_entry(writer, key, value)
        contents = {"token_embd.weight": np.arange(40 * 64, dtype=np.float32).reshape(40, 64)}
        contents |= dict(tensors or {})
        for tensor, values in contents.items():
            kind = (stored or {}).get(tensor)
            if kind is None:
                writer.add_tensor(tensor, values)
            else:
                writer.add_tensor(tensor, gguf.quants.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path if not split_tensors else sorted(tmp_path.glob(f"{path.stem}-00001-of-*"))[0]

    return write


def add_entry(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    for kind, add in (
        (bool, writer.add_bool),
        (int, writer.add_uint32),
        (float, writer.add_float32),
        (str, writer.add_string),
        (list, writer.add_array),
    ):
        if type(value) is kind:
            add(key, value)
            return
    raise TypeError(f"{key}: {value!r}")


CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8}


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder: one safetensors file, or several with their index."""

    def make(
        name: str = "checkpoint",
        *,
        shards: Mapping[str, Mapping[str, np.ndarray]] | None = None,
        config: Mapping[str, Any] = CONFIG,
        files: Mapping[str, str | bytes] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        if shards is None:
            save_file({"a": np.ones((2, 3), np.float32)}, folder / "model.safetensors")
        else:
            for shard, tensors in shards.items():
                save_file(dict(tensors), folder / shard)
            weight_map = {tensor: shard for shard, tensors in shards.items() for tensor in tensors}
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        for file, content in (files or {}).items():
            data = content.encode() if isinstance(content, str) else content
            (folder / file).write_bytes(data)
        return folder

    return make
