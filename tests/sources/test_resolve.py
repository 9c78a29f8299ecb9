"""What a user names: paths, hub ids, and names that are neither."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.errors import (
    DownloadError,
    IncompatibleModelError,
    InvalidParameterError,
    ModelFormatError,
    ModelNotFoundError,
    UnsafeFileError,
)
from octavo.sources.resolve import resolve

SHARDS = {
    "model-00001-of-00002.safetensors": "a",
    "model-00002-of-00002.safetensors": "b",
}


@pytest.fixture(autouse=True)
def _nothing_printed(capfd):
    yield
    assert capfd.readouterr() == ("", "")


def test_a_gguf_file(write_gguf):
    path = write_gguf()
    source = resolve(str(path))
    assert (source.naming, source.location, source.revision) == ("gguf", str(path), None)


def test_a_gguf_file_of_any_name(write_gguf):
    assert resolve(str(write_gguf("model.bin.of.mine"))).naming == "gguf"


def test_a_folder(make_checkpoint):
    folder = make_checkpoint()
    source = resolve(str(folder))
    assert (source.naming, source.location, source.revision) == ("huggingface", str(folder), None)


def test_a_folder_relative_to_the_working_folder_and_to_home(make_checkpoint, monkeypatch, tmp_path: Path):
    make_checkpoint("org/name")
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name").naming == "huggingface"  # a path that exists wins over a hub id
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/org/name").naming == "huggingface"


def test_a_folder_with_one_gguf_file(write_gguf, tmp_path: Path):
    path = write_gguf()
    folder = tmp_path / "folder"
    folder.mkdir()
    path.rename(folder / path.name)
    (folder / "mmproj-model.gguf").write_bytes(b"a vision projector")
    (folder / "config.json").write_text("{}")
    assert resolve(str(folder)).naming == "gguf"


def test_a_folder_with_several_gguf_files(write_gguf, tmp_path: Path):
    write_gguf("a.gguf")
    write_gguf("b.gguf")
    with pytest.raises(ModelNotFoundError, match=r"a\.gguf, b\.gguf") as caught:
        resolve(str(tmp_path))
    assert f"-m {tmp_path}:a.gguf" in caught.value.remedy
    assert resolve(f"{tmp_path}:a.gguf").location == str(tmp_path / "a.gguf")


@pytest.fixture
def variants(write_gguf, tmp_path: Path) -> Path:
    """A folder of one model in many formats, as they are called in the wild."""
    source = write_gguf("source.gguf").rename(tmp_path / "source")
    folder = tmp_path / "variants"
    for name in (
        "name-Q4_K_M.gguf",
        "name-Q4_K_S.gguf",
        "name.q8_0.gguf",
        "name-IQ4_XS.gguf",
        "mmproj-name-F16.gguf",
        "sub/name-BF16.gguf",
        "Q2_K/name.gguf",
        "Q5_0/other-Q6_K.gguf",
        "twice-F32.gguf",
        "sub/twice-f32.gguf",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(source.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("tag", "file"),
    [
        ("Q4_K_M", "name-Q4_K_M.gguf"),
        ("q4_k_m", "name-Q4_K_M.gguf"),
        ("Q4_K_S", "name-Q4_K_S.gguf"),
        ("Q8_0", "name.q8_0.gguf"),
        ("IQ4_XS", "name-IQ4_XS.gguf"),
        ("BF16", "sub/name-BF16.gguf"),
        ("Q2_K", "Q2_K/name.gguf"),
        ("Q6_K", "Q5_0/other-Q6_K.gguf"),
        ("name-Q4_K_M", "name-Q4_K_M.gguf"),
        ("sub/name-BF16.gguf", "sub/name-BF16.gguf"),
    ],
)
def test_a_tag_names_a_gguf_file_of_a_folder(variants: Path, tag: str, file: str):
    assert resolve(f"{variants}:{tag}").location == str(variants / file)


@pytest.mark.parametrize("tag", ["Q3_K", "K_M", "4_K_M", "M", "Q4_K", "F16", "Q4_K_M.ggu", ".*", "none.gguf"])
def test_a_tag_that_names_nothing(variants: Path, tag: str):
    with pytest.raises(ModelNotFoundError, match=r"no (GGUF model tagged|file)") as caught:
        resolve(f"{variants}:{tag}")
    assert tag in caught.value.message
    assert "name-Q4_K_M.gguf" in caught.value.remedy
    assert "sub/name-BF16.gguf" in caught.value.remedy
    assert "mmproj" not in caught.value.remedy


def test_a_tag_that_names_two(variants: Path):
    with pytest.raises(ModelNotFoundError, match=r"2 GGUF models that F32 may mean.*sub/twice-f32\.gguf"):
        resolve(f"{variants}:F32")


def test_a_tag_of_a_folder_without_gguf_files(make_checkpoint):
    with pytest.raises(ModelNotFoundError, match="no GGUF files"):
        resolve(f"{make_checkpoint()}:Q4_0")


def test_a_tag_may_not_lead_out_of_the_folder(variants: Path, write_gguf):
    outside = write_gguf("outside.gguf")
    (variants / "name-Q5_1.gguf").symlink_to(outside)
    with pytest.raises(UnsafeFileError, match="leads out"):
        resolve(f"{variants}:Q5_1")
    with pytest.raises(ModelNotFoundError):
        resolve(f"{variants}:../outside.gguf")


def test_a_gguf_file_of_a_folder_may_not_link_out_of_it(write_gguf, tmp_path: Path):
    path = write_gguf()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.gguf").symlink_to(path)
    with pytest.raises(UnsafeFileError, match="leads out"):
        resolve(str(folder))
    assert resolve(str(folder / "model.gguf")).naming == "gguf"  # named by the user, it may


def test_a_safetensors_file(make_checkpoint):
    folder = make_checkpoint()
    assert set(resolve(str(folder / "model.safetensors")).tensors) == {"a"}


def test_a_shard_stands_for_its_model(make_checkpoint):
    import numpy as np

    values = np.ones(4, np.float32)
    folder = make_checkpoint(shards={shard: {tensor: values} for shard, tensor in SHARDS.items()})
    assert set(resolve(str(folder / next(iter(SHARDS)))).tensors) == {"a", "b"}


def test_a_safetensors_file_without_a_config(make_checkpoint):
    folder = make_checkpoint()
    (folder / "config.json").unlink()
    with pytest.raises(IncompatibleModelError, match=r"config\.json") as caught:
        resolve(str(folder / "model.safetensors"))
    assert "folder" in caught.value.remedy


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_a_pickle_file(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UnsafeFileError, match=name):
        resolve(str(tmp_path / name))


def test_another_file(make_checkpoint):
    with pytest.raises(ModelFormatError, match="not a GGUF file") as caught:
        resolve(str(make_checkpoint() / "config.json"))
    assert "safetensors" in caught.value.remedy


def test_a_fifo(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsafeFileError, match="FIFO"):
        resolve(str(tmp_path / "pipe"))


def test_a_dangling_link(tmp_path: Path):
    (tmp_path / "model.gguf").symlink_to(tmp_path / "gone")
    with pytest.raises(ModelNotFoundError, match=r"model\.gguf"):
        resolve(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    "name", ["smollm", "/nowhere/at/all", "./smollm", "a/b/c", "smollm.gguf", "org/x.gguf"]
)
def test_a_name_that_is_nothing(name: str):
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(name)
    assert name in caught.value.message
    assert "org/name" in caught.value.remedy
    assert "org/name:FILE.gguf" in caught.value.remedy


@pytest.mark.parametrize(
    "name", ["", "a\0b", "x" * 5000, "org/" + "y" * 300, "-/-", "a/..", "org/na me", "h:80/x"]
)
def test_a_name_that_can_be_nothing(name: str):
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(name)
    assert len(caught.value.message) < 400


def test_a_typing_error_in_a_path(write_gguf, tmp_path: Path):
    write_gguf("SmolLM2-135M.gguf")
    (tmp_path / "SmolLM2-folder").mkdir()
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(str(tmp_path / "SmolLM-135M.gguf"))
    assert str(tmp_path / "SmolLM2-135M.gguf") in caught.value.remedy
    assert caught.value.remedy.startswith("Did you mean")


def test_a_hub_id_that_was_meant_as_a_path(make_checkpoint, monkeypatch, tmp_path: Path):
    make_checkpoint("models/SmolLM2-135M")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DownloadError) as caught:
        resolve("models/SmolLM-135M", offline=True)
    assert caught.value.remedy.startswith("Did you mean models/SmolLM2-135M?")


@pytest.mark.parametrize("named", [None, "default", "path"])
def test_a_revision_is_for_hub_repositories(write_gguf, named: str | None):
    model = str(write_gguf()) if named == "path" else named
    with pytest.raises(InvalidParameterError) as caught:
        resolve(model, revision="main")
    assert caught.value.parameter == "revision"


def test_importing_it_imports_nothing_heavy():
    script = (
        "import sys, octavo.sources.resolve; print(sorted({'torch', 'huggingface_hub'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
