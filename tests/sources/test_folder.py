"""Folders of safetensors: what is read, what is refused, and that nothing of a checkpoint ever runs."""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo.errors import (
    IncompatibleModelError,
    ModelFormatError,
    ModelNotFoundError,
    OctavoError,
    UnsafeFileError,
)
from octavo.sources.folder import load_folder
from octavo.sources.model_folder import ModelFolder
from octavo.types import ModelSource

ONES, TWOS = np.ones((2, 3), np.float32), np.full((4,), 2, np.float16)
SHARDS = {
    "model-00001-of-00002.safetensors": {"a": ONES, "b": ONES},
    "model-00002-of-00002.safetensors": {"c": TWOS},
}
INDEX = "model.safetensors.index.json"


def load(path: Path, **options: Any) -> ModelSource:
    return load_folder(ModelFolder.open(path), location=str(path), **options)


def refused(path: Path, kind: type[OctavoError], *says: str) -> OctavoError:
    start = time.perf_counter()
    with pytest.raises(kind) as caught:
        load(path)
    assert time.perf_counter() - start < 1.0
    assert type(caught.value) is kind
    for part in says:
        assert part in caught.value.message
    assert caught.value.remedy
    return caught.value


# --- what is read ---------------------------------------------------------------------------------------


def test_one_file(make_checkpoint):
    source = load(make_checkpoint())
    assert source.naming == "huggingface"
    assert source.config["model_type"] == "llama"
    assert source.generation_config == {}
    assert source.tokenizer is None
    assert source.chat_template is None
    assert source.notices == ()
    np.testing.assert_array_equal(source.tensors["a"].read(), ONES)


def test_shards(make_checkpoint):
    source = load(make_checkpoint(shards=SHARDS))
    assert set(source.tensors) == {"a", "b", "c"}
    np.testing.assert_array_equal(source.tensors["c"].read(), TWOS)


def test_one_file_of_another_name(make_checkpoint):
    folder = make_checkpoint()
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert set(load(folder).tensors) == {"a"}


def test_documents(make_checkpoint):
    source = load(
        make_checkpoint(
            config={"model_type": "llama", "quantization_config": {"quant_method": "gptq"}},
            files={
                "generation_config.json": '{"temperature": 0.5}',
                "tokenizer.json": b"{}",
                "tokenizer.model": b"not preferred",
                "special_tokens_map.json": '{"bos_token": "<a>", "eos_token": "<b>"}',
                "tokenizer_config.json": '{"eos_token": "<c>", "chat_template": "old"}',
                "chat_template.json": '{"chat_template": "older"}',
                "chat_template.jinja": "new",
            },
        )
    )
    assert source.config["quantization_config"] == {"quant_method": "gptq"}
    assert source.generation_config == {"temperature": 0.5}
    assert source.tokenizer.kind == "tokenizer.json"
    assert source.tokenizer.data == b"{}"
    assert source.tokenizer.config == {"bos_token": "<a>", "eos_token": "<c>", "chat_template": "old"}
    assert source.chat_template == "new"


def test_sentencepiece_where_there_is_no_tokenizer_json(make_checkpoint):
    tokenizer = load(make_checkpoint(files={"tokenizer.model": b"\1\2"})).tokenizer
    assert (tokenizer.kind, tokenizer.data) == ("sentencepiece", b"\1\2")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"chat_template": "a"}}, "a"),
        ({"tokenizer_config.json": {"chat_template": ""}}, None),
        ({"tokenizer_config.json": {"chat_template": None}}, None),
        (
            {"chat_template.json": {"chat_template": "b"}, "tokenizer_config.json": {"chat_template": "a"}},
            "b",
        ),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": "tool_use", "template": "t"},
                        {"name": "default", "template": "d"},
                    ]
                }
            },
            "d",
        ),
        ({"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "r"}]}}, None),
    ],
)
def test_where_the_chat_template_stands(make_checkpoint, files: dict[str, Any], expected: str | None):
    contents = {name: json.dumps(value) for name, value in files.items()}
    assert load(make_checkpoint(files=contents)).chat_template == expected


def test_safetensors_beside_pickles(make_checkpoint):
    folder = make_checkpoint(files={"pytorch_model.bin": b"x", "training_args.bin": b"x"})
    assert set(load(folder).tensors) == {"a"}


# --- what leads out of the folder, or is no file --------------------------------------------------------


def with_index(folder: Path, weight_map: Any) -> Path:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "..",
        "/etc/passwd",
        "sub/../../outside.safetensors",
        "sub/model.safetensors",
        "C:\\outside.safetensors",
        "..\\outside.safetensors",
        "~/outside.safetensors",
        "-rf.safetensors",
        ".hidden.safetensors",
        "a\0b.safetensors",
        "a\nb.safetensors",
        "",
        None,
        5,
        ["model.safetensors"],
    ],
)
def test_an_index_may_only_name_files_beside_it(make_checkpoint, tmp_path: Path, shard: object):
    folder = make_checkpoint(shards=SHARDS)
    (tmp_path / "outside.safetensors").write_bytes((folder / next(iter(SHARDS))).read_bytes())
    refused(with_index(folder, {"a": shard}), UnsafeFileError, "no plain file name")


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_an_index_without_a_map(make_checkpoint, weight_map: object):
    refused(with_index(make_checkpoint(shards=SHARDS), weight_map), ModelFormatError, "weight_map")


def test_an_index_of_pickles(make_checkpoint):
    folder = with_index(make_checkpoint(shards=SHARDS), {"a": "pytorch_model.bin"})
    refused(folder, UnsafeFileError, "pytorch_model.bin")


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "chat_template.jinja"],
)
def test_a_link_out_of_the_folder(make_checkpoint, tmp_path: Path, name: str):
    folder = make_checkpoint()
    outside = tmp_path / "outside"
    present = (folder / name).exists()
    outside.write_bytes((folder / name).read_bytes() if present else b"{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    refused(folder, UnsafeFileError, name, "leads out of its folder")


def test_a_link_within_the_folder(make_checkpoint):
    folder = make_checkpoint()
    (folder / "model.safetensors").rename(folder / "real.safetensors")
    (folder / "model.safetensors").symlink_to("real.safetensors")
    assert set(load(folder).tensors) == {"a"}


def test_a_folder_that_is_a_link(make_checkpoint, tmp_path: Path):
    link = tmp_path / "link"
    link.symlink_to(make_checkpoint())
    assert set(load(link).tensors) == {"a"}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_fifo(make_checkpoint, name: str):
    folder = make_checkpoint()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(folder, UnsafeFileError, name, "FIFO")


def test_a_folder_in_a_files_place(make_checkpoint):
    folder = make_checkpoint()
    (folder / "tokenizer.json").mkdir()
    refused(folder, UnsafeFileError, "tokenizer.json", "a folder")


def hub_layout(tmp_path: Path, source: Path) -> Path:
    """CACHE/models--org--name/snapshots/COMMIT with links into blobs, one of them shared by repositories."""
    repository = tmp_path / "cache" / "models--org--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    shared = tmp_path / "cache" / "blobs" / "ab"
    shared.mkdir(parents=True)
    for file in source.iterdir():
        blob = repository / "blobs" / f"blob-of-{file.name}"
        if file.suffix == ".safetensors":
            (shared / "hash").write_bytes(file.read_bytes())
            blob.symlink_to("../../blobs/ab/hash")
        else:
            blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


def test_a_snapshot_in_the_hubs_cache_links_into_its_blobs(make_checkpoint, tmp_path: Path):
    assert set(load(hub_layout(tmp_path, make_checkpoint())).tensors) == {"a"}


def test_a_snapshot_may_link_nowhere_else(make_checkpoint, tmp_path: Path):
    snapshot = hub_layout(tmp_path, make_checkpoint())
    other = tmp_path / "cache" / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "x").write_bytes(b"{}")
    (snapshot / "tokenizer.json").symlink_to("../../../models--org--other/blobs/x")
    refused(snapshot, UnsafeFileError, "leads out of its folder")


def test_the_blobs_of_a_snapshot_may_not_be_elsewhere(make_checkpoint, tmp_path: Path):
    snapshot = hub_layout(tmp_path, make_checkpoint())
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    refused(snapshot, UnsafeFileError, "leads out of its folder")


# --- what is missing or contradicts itself --------------------------------------------------------------


def test_a_missing_shard(make_checkpoint):
    folder = make_checkpoint(shards=SHARDS)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, ModelNotFoundError, "model-00002-of-00002.safetensors", "missing")


def test_a_shard_that_is_a_dangling_link(make_checkpoint):
    folder = make_checkpoint(shards=SHARDS)
    (folder / "model-00002-of-00002.safetensors").unlink()
    (folder / "model-00002-of-00002.safetensors").symlink_to("gone.safetensors")
    refused(folder, ModelNotFoundError, "missing")


def test_a_tensor_that_is_listed_but_absent(make_checkpoint):
    folder = make_checkpoint(shards=SHARDS)
    first, second = SHARDS
    refused(
        with_index(folder, {"a": first, "b": first, "c": second, "d": second}),
        ModelFormatError,
        "'d'",
        "where it is not",
    )


def test_a_tensor_in_two_shards(make_checkpoint):
    first, second = SHARDS
    folder = make_checkpoint(shards={first: {"a": ONES, "b": ONES}, second: {"a": ONES, "c": TWOS}})
    refused(folder, ModelFormatError, "'a'", "two files")


def test_several_files_without_an_index(make_checkpoint):
    folder = make_checkpoint(shards=SHARDS)
    (folder / INDEX).unlink()
    refused(folder, ModelFormatError, "2 safetensors files", INDEX)


def test_no_config(make_checkpoint):
    folder = make_checkpoint()
    (folder / "config.json").unlink()
    refused(folder, IncompatibleModelError, "config.json")


def test_no_weights(make_checkpoint):
    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()
    refused(folder, IncompatibleModelError, "no weights", "config.json")


def test_an_adapter_alone(make_checkpoint):
    folder = make_checkpoint(files={"adapter_config.json": "{}"})
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    refused(folder, IncompatibleModelError, "adapter")


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", INDEX],
)
@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b'{"a": 1, "a": 2}', b"\xff", b""])
def test_malformed_documents(make_checkpoint, name: str, content: bytes):
    folder = make_checkpoint(shards=SHARDS)
    (folder / name).write_bytes(content)
    refused(folder, ModelFormatError, name)


@pytest.mark.parametrize("template", [5, {"a": 1}, True])
def test_a_chat_template_that_is_no_text(make_checkpoint, template: object):
    folder = make_checkpoint(files={"tokenizer_config.json": json.dumps({"chat_template": template})})
    refused(folder, ModelFormatError, "chat template")


def test_a_chat_template_that_is_not_utf8(make_checkpoint):
    refused(make_checkpoint(files={"chat_template.jinja": b"\xff"}), ModelFormatError, "chat_template.jinja")


def test_a_huge_document(make_checkpoint):
    folder = make_checkpoint(files={"tokenizer_config.json": b"{}"})
    os.truncate(folder / "tokenizer_config.json", 1 << 30)  # sparse
    refused(folder, ModelFormatError, "tokenizer_config.json", "larger than")


# --- code -----------------------------------------------------------------------------------------------


class Canary:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.PKL", "x.pickle", "x.joblib"]
)
def test_pickles_are_refused_by_name_and_never_opened(make_checkpoint, tmp_path: Path, name: str):
    canary = tmp_path / "canary"
    folder = make_checkpoint(files={name: pickle.dumps(Canary(canary))})
    assert pickle.loads((folder / name).read_bytes()).close() is None  # the canary works
    canary.unlink()
    (folder / "model.safetensors").unlink()
    (folder / name).chmod(0)
    error = refused(folder, UnsafeFileError, name)
    assert "safetensors" in error.remedy
    assert not canary.exists()


CODE = "from pathlib import Path\nPath({path!r}).touch()\n"


def test_code_of_a_checkpoint_is_not_run_or_copied(make_checkpoint, tmp_path: Path, monkeypatch):
    canary, modules = tmp_path / "canary", tmp_path / "hf"
    monkeypatch.setenv("HF_HOME", str(modules))
    monkeypatch.setenv("HF_MODULES_CACHE", str(modules / "modules"))
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    code = CODE.format(path=str(canary))
    folder = make_checkpoint(
        config={"model_type": "llama", "auto_map": auto_map, "text_config": {"auto_map": auto_map}},
        files={
            "code.py": code,
            "__init__.py": code,
            "conftest.py": code,
            "tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": ["code.T", None]}}),
            "generation_config.json": json.dumps({"custom_generate": "code"}),
        },
    )
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    before, modules_before = set(folder.rglob("*")), set(sys.modules)
    source = load(folder)
    assert source.notices == ("code that came with the model (auto_map) is not used",)
    assert not canary.exists()
    assert not modules.exists()
    assert set(folder.rglob("*")) == before
    assert not any("code" in name for name in set(sys.modules) - modules_before)


def test_a_model_that_needs_its_own_code_is_refused(make_checkpoint):
    folder = make_checkpoint(config={"auto_map": {"AutoConfig": "code.Config"}})
    refused(folder, UnsafeFileError, "auto_map")


# --- fingerprint ----------------------------------------------------------------------------------------


def test_fingerprint_is_the_same_at_the_next_start_and_elsewhere_by_name(make_checkpoint, tmp_path: Path):
    folder = make_checkpoint(shards=SHARDS)
    first = load(folder).fingerprint
    assert load(folder).fingerprint == first
    link = tmp_path / "other-name"
    link.symlink_to(folder)
    assert load(link).fingerprint == first


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b'{"model_type": "gemma2"}'),
        ("generation_config.json", b'{"temperature": 1}'),
        ("tokenizer.json", b"{ }"),
        ("tokenizer_config.json", b'{"bos_token": "x"}'),
        ("chat_template.jinja", b"other"),
    ],
)
def test_fingerprint_changes_with_any_document(make_checkpoint, name: str, content: bytes):
    folder = make_checkpoint()
    first = load(folder).fingerprint
    (folder / name).write_bytes(content)
    assert load(folder).fingerprint != first


def test_fingerprint_changes_with_weights_whose_times_were_set_back(make_checkpoint):
    folder = make_checkpoint()
    path = folder / "model.safetensors"
    first, times = load(folder).fingerprint, path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    now = path.stat()
    assert (now.st_size, now.st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    assert load(folder).fingerprint != first


def test_fingerprint_of_a_hub_snapshot_is_its_content(make_checkpoint, tmp_path: Path):
    """It survives what a copy to another machine changes, and not another blob or commit."""
    snapshot = hub_layout(tmp_path, make_checkpoint())

    def fingerprint(commit: str = "a" * 40) -> str:
        return load_folder(ModelFolder.open(snapshot, commit), location="org/name").fingerprint

    first = fingerprint()
    (snapshot / "model.safetensors").resolve().touch()
    assert fingerprint() == first
    assert fingerprint("b" * 40) != first
    link = snapshot / "model.safetensors"
    link.resolve().rename(snapshot.parents[1] / "blobs" / "another-blob")
    link.unlink()
    link.symlink_to("../../blobs/another-blob")
    assert fingerprint() != first
