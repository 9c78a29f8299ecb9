"""docs/formats.md tells the truth: every format is on it, with the bits that the code stores and the runners."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest

from octavo.quant import format_named, stored_format
from octavo.quant.checkpoint import _METHODS
from octavo.quant.format import Format
from octavo.quant.ggml_blocks import BLOCK_TYPES
from octavo.runners.cpu.layout import encoding_of as cpu_encoding_of
from octavo.runners.cuda.layout import encoding_of as cuda_encoding_of
from octavo.settings import QuantName

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "formats.md").read_text(encoding="utf-8")
COLUMNS = 4096


def rows_under(heading: str) -> Iterator[dict[str, str]]:
    section = PAGE.split(f"## {heading}", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    names = [cell.strip() for cell in lines[0].strip("|").split("|")]
    for line in lines[2:]:
        yield dict(zip(names, (cell.strip().strip("`") for cell in line.strip("|").split("|")), strict=True))


def bits(form: Format) -> float:
    return form.nbytes(1, COLUMNS) * 8 / COLUMNS


def assert_runners(row: dict[str, str], form: Format) -> None:
    assert row["reference"] == "yes"
    taken = {
        "cpu": cpu_encoding_of(form, COLUMNS, 8) is not None,
        "cuda": cuda_encoding_of(form) is not None,
    }
    for runner, takes in taken.items():
        assert row[runner] == "yes" if takes else row[runner].startswith("no: ")


NAMED = {row["name"]: row for row in rows_under("What a user can ask for")}
GGUF = {row["type"].lower(): row for row in rows_under("GGUF")}


def test_every_name_is_on_the_page():
    assert set(NAMED) == set(QuantName.__args__)
    assert set(GGUF) == {*BLOCK_TYPES, "f32", "f16", "bf16"}
    assert {row["method"] for row in rows_under("Quantized Hugging Face checkpoints")} == set(_METHODS)


@pytest.mark.parametrize("name", sorted(set(NAMED) - {"auto", "none"}))
def test_named_formats(name):
    form = format_named(name)
    assert float(NAMED[name]["stored"]) == pytest.approx(bits(form), abs=1e-3)
    assert_runners(NAMED[name], form)


@pytest.mark.parametrize("name", sorted(GGUF))
def test_gguf_types(name):
    form = stored_format(name)
    assert form is not None
    elements, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
    assert float(GGUF[name]["file"]) == 8 * nbytes / elements
    assert float(GGUF[name]["stored"]) == bits(form)
    assert_runners(GGUF[name], form)


@pytest.mark.parametrize("name", ["formats.md", "adding-a-format.md"])
def test_every_path_exists(name):
    text = (DOCS / name).read_text(encoding="utf-8")
    paths = re.findall(r"`((?:src|docs|tests|benchmarks|csrc)/[\w/.-]+)`", text)
    assert len(paths) > 3
    assert not [path for path in paths if not (DOCS.parent / path).exists()]
