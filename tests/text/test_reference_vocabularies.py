"""GGUF tokenizers against the reference ids that llama.cpp tests its own with (figure 34 of the project's list)."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import IncompatibleModelError
from octavo.sources.gguf import read_gguf
from octavo.text.tokenizer import Tokenizer, load_tokenizer
from octavo.types import TokenizerSource

pytestmark = pytest.mark.reference_data

CASES = {
    "command-r": 47,
    "deepseek-coder": 47,
    "deepseek-llm": 47,
    "falcon": 47,
    "gpt-2": 47,
    "llama-bpe": 47,
    "llama-spm": 47,
    "mpt": 47,
    "phi-3": 47,
    "qwen2": 47,
    "qwen35": 51,
    "refact": 47,
    "starcoder": 47,
}
REFUSED = {
    "bert-bge": "'bert'",  # no causal language model
    "gemma-4": "'gemma4'",  # of a family that is not read
}
"""Refused by name, never cut into wrong tokens."""
BYTE_LEVEL = sorted(set(CASES) - {"llama-spm", "phi-3", "falcon"})
"""Vocabularies that can spell every assigned character; Falcon's lacks some control characters, and drops them."""


def load(folder: Path, name: str) -> Tokenizer:
    metadata = read_gguf(folder / f"ggml-vocab-{name}.gguf").metadata
    return load_tokenizer(TokenizerSource("gguf", metadata=metadata))


@pytest.mark.parametrize("name", CASES)
def test_reference_ids(llama_cpp_models: Path, name: str) -> None:
    texts = (llama_cpp_models / f"ggml-vocab-{name}.gguf.inp").read_text(encoding="utf-8")
    ids = (llama_cpp_models / f"ggml-vocab-{name}.gguf.out").read_text(encoding="utf-8")
    tokenizer = load(llama_cpp_models, name)
    pairs = list(zip(texts.split("\n__ggml_vocab_test__\n"), ids.split("\n"), strict=False))
    assert len(pairs) == CASES[name]
    wrong = [
        text
        for text, expected in pairs
        if tokenizer.encode(text, parse_special=False) != [int(token_id) for token_id in expected.split()]
    ]
    assert not wrong


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_by_name(llama_cpp_models: Path, name: str) -> None:
    with pytest.raises(IncompatibleModelError) as caught:
        load(llama_cpp_models, name)
    assert REFUSED[name] in caught.value.message


@pytest.fixture(scope="module")
def byte_level(llama_cpp_models: Path) -> dict[str, Tokenizer]:
    return {name: load(llama_cpp_models, name) for name in BYTE_LEVEL}


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs", "Cn", "Co")), max_size=60))
def test_any_text_comes_back(byte_level: dict[str, Tokenizer], text: str) -> None:
    for tokenizer in byte_level.values():
        assert tokenizer.decode(tokenizer.encode(text, parse_special=False), keep_special=True) == text
