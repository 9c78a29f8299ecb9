"""docs/formats.md tells the truth: every format is on it, with the bits that the code stores and the runners."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch

from octavo import LLM
from octavo.errors import OctavoError
from octavo.quant import format_named, stored_format
from octavo.quant.affine import LLM_INT8, Affine
from octavo.quant.checkpoint import _METHODS, open_quantized
from octavo.quant.codebook import NF4, Codebook
from octavo.quant.format import Format
from octavo.quant.ggml_blocks import BLOCK_TYPES
from octavo.runners.cpu.layout import encoding_of as cpu_encoding_of
from octavo.runners.cuda.layout import encoding_of as cuda_encoding_of
from octavo.settings import QuantName
from octavo.sources.resolve import resolve

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


# --- quantized checkpoints -----------------------------------------------------------------------------------

WRITTEN: dict[tuple[str, str], tuple[str, ...]] = {
    ("gptq", "4 and 8 bits"): ("gptq-4", "gptq-4-sym", "gptq-8"),
    ("gptq", "the same with `desc_act"): ("gptq-4-act",),
    ("awq", "GEMM layout"): ("awq-4",),
    ("compressed-tensors", "pack-quantized"): (
        *("compressed-w4a16-g32", "compressed-w4a16-channel", "compressed-w4a16-zero"),
        *("compressed-w8a16-channel", "compressed-w8a16-zero"),
    ),
    ("compressed-tensors", "int-quantized"): ("compressed-int8-tensor", "compressed-int8-channel"),
    ("compressed-tensors", "float-quantized"): (
        *("compressed-float8-tensor", "compressed-float8-channel", "compressed-float8-block"),
    ),
    ("fp8", "e4m3 with a scale for each block"): ("fp8-64", "fp8-32"),
    ("fbgemm_fp8", "e4m3 with a scale for each row"): ("fbgemm_fp8",),
}
"""Rows by method and beginning of what is read -> checkpoints; bitsandbytes' are in BITSANDBYTES."""
BITSANDBYTES: dict[tuple[str, str], tuple[Format, ...]] = {
    ("bitsandbytes", "LLM.int8"): (LLM_INT8,),
    ("bitsandbytes", "nf4, fp4"): (NF4, replace(NF4, name="fp4-g64", table="fp4", rounding=None)),
}
CHECKPOINTS = list(rows_under("Quantized Hugging Face checkpoints"))
IDS = [3, 17, 80, 4, 4, 60, 21, 8, 95, 1]


def row_of(key: tuple[str, str]) -> dict[str, str]:
    (row,) = (
        row for row in CHECKPOINTS if row["method"] == key[0] and row["what is read"].startswith(key[1])
    )
    return row


def says_yes(cell: str, form: Format) -> bool:
    """Whether a runner's cell promises kernels for this format."""
    if cell == "yes, blocks of whole 64 columns":
        group = getattr(form, "group_size", None)
        return group is None or group % 64 == 0
    return cell == "yes"


def test_every_row_of_the_checkpoints_is_tried():
    assert len(CHECKPOINTS) == len(WRITTEN) + len(BITSANDBYTES)
    assert {stem for stems in WRITTEN.values() for stem in stems} >= {
        path.stem for path in (Path(__file__).parent / "checkpoints").glob("*.safetensors")
    }
    for key in (*WRITTEN, *BITSANDBYTES):
        assert row_of(key)["reference"] == "yes"


@pytest.mark.parametrize(("key", "form"), [(k, form) for k, forms in BITSANDBYTES.items() for form in forms])
def test_bitsandbytes_rows(key, form):
    row = row_of(key)
    assert float(row["stored"]) == pytest.approx(bits(form), abs=1e-3)
    assert_runners(row, form)


@pytest.mark.parametrize(("key", "stem"), [(key, stem) for key, stems in WRITTEN.items() for stem in stems])
def test_a_checkpoint_runs_where_the_page_says(key, stem, checkpoint):
    """By transformers on the library's own weights: logits of the runners that take it, and the reason of those that
    do not."""
    row, made = row_of(key), checkpoint(stem)
    form = open_quantized(resolve(str(made.folder))).tensors["model.layers.0.self_attn.q_proj.weight"].format
    assert (cuda_encoding_of(form) is not None) == says_yes(row["cuda"], form)
    takes = says_yes(row["cpu"], form)
    assert takes or row["cpu"].startswith(("no: ", "yes, blocks of whole"))
    expected = made.logprobs(IDS)
    settings = {"device": "cpu", "cache": False, "context": 64, "threads": 1}
    with LLM(made.folder, runner="reference", **settings) as llm:
        assert form.name in llm.info()["quant"]
        torch.testing.assert_close(torch.tensor(llm.score(IDS).logprobs), expected, rtol=0, atol=1e-4)
    if takes:
        with LLM(made.folder, runner="cpu", **settings) as llm:
            torch.testing.assert_close(torch.tensor(llm.score(IDS).logprobs), expected, rtol=0, atol=5e-3)
        return
    with pytest.raises(OctavoError, match=form.name):
        LLM(made.folder, runner="cpu", **settings)
    with LLM(made.folder, runner="auto", **settings) as llm:
        assert llm.info()["runner"] == "reference"


def test_stored_bits_of_the_checkpoints():
    """For groups of 128 where a checkpoint chooses, which is what they are shared in."""
    four = Affine("g128", 4, 128, "integer", "f16", "step", None)
    packed = Affine("g128", 4, 128, "none", "f32", "step", None)
    blocks, rows = Codebook("g128", "e4m3", 128, "f32", None), Codebook("rows", "e4m3", None, "f32", None)
    expected = {
        ("gptq", "4 and 8 bits"): four,
        ("gptq", "the same with"): four,
        ("awq", "GEMM"): four,
        ("compressed-tensors", "pack"): packed,
        ("compressed-tensors", "float"): blocks,
        ("fp8", ""): blocks,
        ("fbgemm_fp8", ""): rows,
    }
    for key, form in expected.items():
        assert float(row_of(key)["stored"]) == pytest.approx(bits(form), abs=1e-3), key
