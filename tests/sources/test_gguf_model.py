"""A GGUF file as a ModelSource: tokenizer, template, notices, fingerprint."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest

from octavo.errors import ModelFormatError
from octavo.models import build_model
from octavo.sources.gguf_model import load_gguf


def test_a_model_is_whole(write_gguf):
    path = write_gguf(
        metadata={
            "tokenizer.chat_template": "{{ messages }}",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.scores": [0.5, 1.0],
        },
        tensors={"rope_freqs.weight": np.ones(8, np.float32)},
    )
    source = load_gguf(path, location="tiny")
    assert source.location == "tiny"
    assert source.revision is None
    assert source.naming == "gguf"
    assert source.config["model_type"] == "llama"
    assert source.generation_config == {"bos_token_id": 1, "eos_token_id": [2]}
    assert source.chat_template == "{{ messages }}"
    assert source.tokenizer.kind == "gguf"
    assert source.tokenizer.metadata == {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(40)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.scores": [0.5, 1.0],
    }
    assert list(source.tensors) == ["token_embd.weight"]  # rope factors went into the config
    assert source.notices == ()


def test_a_quantized_file_says_what_full_precision_means(write_gguf):
    table = np.ones((40, 64), np.float32)
    path = write_gguf(
        tensors={"small.weight": table[:8], "large.weight": table},
        stored={
            "small.weight": gguf.GGMLQuantizationType.Q8_0,
            "large.weight": gguf.GGMLQuantizationType.Q4_1,
        },
    )
    assert load_gguf(path, location="tiny").quantized_as == ("q4_1", "q8_0")


def test_a_file_without_tokenizer_or_template_still_loads(write_gguf):
    path = write_gguf(metadata={"tokenizer.ggml.model": None, "tokenizer.ggml.tokens": None})
    source = load_gguf(path, location="tiny")
    assert source.tokenizer is None
    assert source.chat_template is None


def test_a_vocabulary_alone_is_no_model(tmp_path: Path):
    path = tmp_path / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key in ("context_length", "embedding_length", "block_count", "feed_forward_length"):
        writer.add_uint32(f"llama.{key}", 64)
    writer.add_uint32("llama.attention.head_count", 4)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelFormatError, match="token_embd"):
        load_gguf(path, location="vocabulary")


def test_fingerprint_changes_with_the_file_and_not_with_the_start(write_gguf):
    path = write_gguf()
    first = load_gguf(path, location="a").fingerprint
    assert load_gguf(path, location="b").fingerprint == first
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    times = path.stat()
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as cp -p would leave it
    assert load_gguf(path, location="a").fingerprint != first


def test_a_known_identity_counts_instead_of_the_files_times(write_gguf):
    path = write_gguf()
    first = load_gguf(path, location="a", identity="known").fingerprint
    path.touch()
    assert load_gguf(path, location="a", identity="known").fingerprint == first
    assert load_gguf(path, location="a", identity="other").fingerprint != first
    changed = write_gguf(metadata={"tokenizer.chat_template": "new"})
    assert load_gguf(changed, location="a", identity="known").fingerprint != first


@pytest.mark.model
def test_default_model_fits_its_spec(default_model_path: Path):
    source = load_gguf(default_model_path, location="default")
    _, parameters = build_model(source.config, source.naming)
    assert {parameter.source for parameter in parameters} == set(source.tensors)
    for parameter in parameters:
        assert source.tensors[parameter.source].shape == parameter.shape
    assert source.generation_config["eos_token_id"] == [2]
    assert "<|im_start|>" in source.chat_template
    assert source.quantized_as == ("q4_1", "q8_0")
