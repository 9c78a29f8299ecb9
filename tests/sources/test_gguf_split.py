"""Split GGUF models, written by the gguf package, against the same model in one file."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from octavo.errors import ModelFormatError, ModelNotFoundError, OctavoError
from octavo.sources.gguf import MAX_ENTRIES
from octavo.sources.gguf_names import gguf_models, parts_of
from octavo.sources.resolve import resolve

TENSORS = {f"blk.{i}.attn_norm.weight": np.full(64, i, np.float32) for i in range(4)}
"""With the embedding five: parts of two, two and one."""


@pytest.fixture
def parts(write_gguf) -> list[Path]:
    first = write_gguf("model.gguf", tensors=TENSORS, split_tensors=2)
    return [first.with_name(name) for name in parts_of(first.name)]


def test_all_parts_are_one_model(parts: list[Path], write_gguf):
    whole, split = resolve(str(write_gguf("whole.gguf", tensors=TENSORS))), resolve(str(parts[0]))
    assert len(parts) == 3
    assert all(part.exists() for part in parts)
    assert (split.config, split.generation_config) == (whole.config, whole.generation_config)
    assert split.tokenizer == whole.tokenizer
    assert list(split.tensors) == list(whole.tensors)
    for name, tensor in whole.tensors.items():
        np.testing.assert_array_equal(split.tensors[name].read(), tensor.read())


def test_any_part_stands_for_its_model_and_so_does_the_folder(parts: list[Path]):
    source = resolve(str(parts[0]))
    assert source.location == str(parts[0])
    for named in (str(parts[2]), f"{parts[0].parent}:model", f"{parts[0].parent}:{parts[1].name}"):
        found = resolve(named)
        assert (found.location, found.fingerprint) == (source.location, source.fingerprint)
    assert resolve(str(parts[0].parent)).fingerprint == source.fingerprint


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_fingerprint_is_of_all_parts(parts: list[Path], number: int):
    first = resolve(str(parts[0])).fingerprint
    assert resolve(str(parts[0])).fingerprint == first
    data = bytearray(parts[number].read_bytes())
    data[-40] ^= 1
    parts[number].write_bytes(data)
    assert resolve(str(parts[0])).fingerprint != first


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_part_that_is_missing(parts: list[Path], number: int):
    parts[number].unlink()
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(str(parts[(number + 1) % 3]))
    assert f"lacks 1 of the 3 parts of {parts[0].name}: {parts[number].name}" in caught.value.message


def wrong(path: Path, *says: str) -> None:
    with pytest.raises(ModelFormatError) as caught:
        resolve(str(path))
    for part in says:
        assert part in caught.value.message
    assert caught.value.remedy


def test_a_part_that_is_there_twice(parts: list[Path]):
    shutil.copy(parts[0], parts[1])
    wrong(parts[0], parts[1].name, "stands for part 2 of 3, but says that it is part 1 of 3")


def test_parts_in_the_wrong_order(parts: list[Path], tmp_path: Path):
    parts[1].rename(tmp_path / "kept")
    parts[2].rename(parts[1])
    (tmp_path / "kept").rename(parts[2])
    wrong(parts[0], parts[1].name, "part 2 of 3", "part 3 of 3")


def test_a_file_that_is_no_part(parts: list[Path], write_gguf):
    write_gguf("whole.gguf").rename(parts[1])
    wrong(parts[0], parts[1].name, "stands for part 2 of 3, but says that it is part None of None")


def test_a_part_of_another_model(parts: list[Path], write_gguf):
    more = TENSORS | {"output.weight": np.ones((40, 64), np.float32)}
    other = write_gguf("other.gguf", tensors=more, split_tensors=2)
    other.with_name(parts_of(other.name)[1]).rename(parts[1])
    wrong(parts[0], parts[1].name, "split.tensors.count = 6, and the first part 5", "different models")


def test_a_part_of_a_model_of_as_many_tensors(parts: list[Path], write_gguf):
    """Then a tensor is there twice, or too few are there."""
    names = list(TENSORS)
    other = write_gguf(
        "other.gguf",
        tensors={
            "a": TENSORS[names[0]],
            names[0]: TENSORS[names[0]],
            "b": np.ones(64, np.float32),
            "c": np.ones(64, np.float32),
        },
        split_tensors=2,
    )
    other.with_name(parts_of(other.name)[1]).rename(parts[1])
    wrong(parts[0], parts[1].name, names[0], f"which {parts[0].name} has as well")


def test_parts_with_too_few_tensors(write_gguf):
    first = write_gguf("model.gguf", tensors=TENSORS, split_tensors=2)
    data = first.read_bytes()
    key = b"split.tensors.count\5\0\0\0"
    assert data.count(key) == 1
    for name in parts_of(first.name):
        part = first.with_name(name)
        part.write_bytes(part.read_bytes().replace(key + b"\5", key + b"\6"))
    wrong(first, first.name, "says that the model has 6 tensors; its parts hold 5")


def test_a_part_without_its_number_in_its_name(parts: list[Path]):
    wrong(parts[1].rename(parts[1].with_name("merged.gguf")), "merged.gguf says that it is part 2 of 3")


def test_a_part_cut_short(parts: list[Path]):
    parts[2].write_bytes(parts[2].read_bytes()[:-64])
    wrong(parts[0], parts[2].name, "the file ends")


def test_a_model_of_one_part(write_gguf):
    path = write_gguf("model-00001-of-00001.gguf", metadata={"split.count": 1, "split.no": 0})
    assert resolve(str(path)).location == str(path)


@pytest.mark.parametrize(
    "name", ["x-00000-of-00003.gguf", "x-00004-of-00003.gguf", "x-1-of-3.gguf", "-00001-of-00002.gguf"]
)
def test_names_that_only_look_like_parts(name: str):
    assert parts_of(name) == (name,)


def test_a_name_that_claims_many_parts_costs_no_more_than_a_short_one(tmp_path: Path):
    names = [f"{i}-{i:05}-of-99999.gguf" for i in range(1, MAX_ENTRIES)]
    assert len(gguf_models(names)) == len(names)
    (tmp_path / "x-00001-of-99999.gguf").write_bytes(b"GGUF")
    with pytest.raises(OctavoError, match="lacks 99998 of the 99999 parts") as caught:
        resolve(str(tmp_path / "x-00001-of-99999.gguf"))
    assert len(caught.value.message) < 1000
