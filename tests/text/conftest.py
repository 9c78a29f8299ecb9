"""Small real tokenizers, trained on text that is in every Python, and the default model's own."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from octavo.text.tokenizer import Tokenizer, load_tokenizer
from octavo.types import TokenizerSource

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PIECE_KINDS = {"normal": 1, "unknown": 2, "control": 3, "user": 4, "unused": 5, "byte": 6}


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return [text for _, text in sorted(pydoc_data.topics.topics.items())]


@pytest.fixture(scope="session")
def byte_level_json(corpus: list[str]) -> str:
    """tokenizer.json of a byte-level BPE of 1,200 tokens, with the added tokens of a chat model."""
    pipeline = tokenizers.Tokenizer(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    pipeline.train_from_iterator(corpus[:20], trainer)
    pipeline.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    pipeline.add_tokens(
        [
            AddedToken(text, normalized=False)
            for text in ("<think>", "</think>", "[TOOL]", "    ", "<table>", "õ")
        ]
    )
    return pipeline.to_str()


@pytest.fixture(scope="session")
def byte_level(byte_level_json: str) -> Tokenizer:
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "add_bos_token": False}
    return load_tokenizer(TokenizerSource("tokenizer.json", byte_level_json.encode(), config=config))


def train_sentencepiece(
    corpus: list[str], folder: Path, **options: Any
) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece BPE of 1,000 pieces with byte fallback, as Llama 2's and Gemma's."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in corpus[:20] for line in text.splitlines() if line),
        model_prefix=str(folder / "model"),
        model_type="bpe",
        vocab_size=1000,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["<start_of_turn>", "<end_of_turn>"],
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "model.model"))


def converted(
    processor: sentencepiece.SentencePieceProcessor, user_defined: list[str], **more: Any
) -> dict[str, Any]:
    """As llama.cpp's converter writes it into a GGUF file."""

    def kind(number: int) -> int:
        if processor.is_unknown(number):
            return PIECE_KINDS["unknown"]
        if processor.is_control(number):
            return PIECE_KINDS["control"]
        if processor.is_byte(number):
            return PIECE_KINDS["byte"]
        return PIECE_KINDS["user" if processor.id_to_piece(number) in user_defined else "normal"]

    numbers = range(processor.get_piece_size())
    pieces = [processor.id_to_piece(number) for number in numbers]
    entries = {
        "model": "llama",
        "tokens": [piece.replace("▁", " ") if piece in user_defined else piece for piece in pieces],
        "scores": [processor.get_score(number) for number in numbers],
        "token_type": [kind(number) for number in numbers],
        "bos_token_id": processor.bos_id(),
        "eos_token_id": processor.eos_id(),
        "unknown_token_id": processor.unk_id(),
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in entries.items()}


SentencePiece = tuple[sentencepiece.SentencePieceProcessor, dict[str, Any]]
"""A model, and the same as GGUF metadata."""


@pytest.fixture(scope="session")
def llama_like(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> SentencePiece:
    """With a dummy space before the text."""
    processor = train_sentencepiece(corpus, tmp_path_factory.mktemp("llama"))
    return processor, converted(processor, [])


@pytest.fixture(scope="session")
def gemma_like(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> SentencePiece:
    """Without one, and with user-defined pieces, runs of spaces among them."""
    user_defined = ["<table>", "▁▁▁▁", "▁▁", "\n\n"]
    processor = train_sentencepiece(
        corpus, tmp_path_factory.mktemp("gemma"), add_dummy_prefix=False, user_defined_symbols=user_defined
    )
    return processor, converted(processor, user_defined, add_space_prefix=False)


@pytest.fixture(scope="session")
def sentencepiece_gguf(llama_like: SentencePiece) -> Tokenizer:
    return load_tokenizer(TokenizerSource("gguf", metadata=llama_like[1]))


@pytest.fixture(scope="session")
def gemma_gguf(gemma_like: SentencePiece) -> Tokenizer:
    return load_tokenizer(TokenizerSource("gguf", metadata=gemma_like[1]))


@pytest.fixture(scope="session")
def metaspace_json(sentencepiece_gguf: Tokenizer) -> str:
    """The same pieces in the shape of newer Llama-2-like files: Metaspace puts a space before the first word."""
    pipeline = tokenizers.Tokenizer(sentencepiece_gguf._pipeline.model)
    pipeline.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    pipeline.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    pipeline.add_special_tokens(
        [
            AddedToken("<unk>", normalized=False),
            AddedToken("<s>", normalized=False),
            AddedToken("</s>", normalized=False),
            AddedToken("<start_of_turn>", rstrip=True, normalized=False),
            AddedToken("<end_of_turn>", lstrip=True, normalized=False),
        ]
    )
    return pipeline.to_str()


@pytest.fixture(scope="session")
def metaspace(metaspace_json: str) -> Tokenizer:
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    return load_tokenizer(TokenizerSource("tokenizer.json", metaspace_json.encode(), config=config))


@pytest.fixture(scope="session")
def unigram(corpus: list[str]) -> Tokenizer:
    """A Unigram vocabulary: its model contains "<s>" itself, and it has no bytes to fall back to."""
    pieces = [("<unk>", 0.0), ("<s>", -1.0), ("</s>", -1.0), ("▁", -2.0), ("▁the", -3.0)]
    letters = sorted({character for text in corpus[:20] for character in text if not character.isspace()})
    pipeline = tokenizers.Tokenizer(
        models.Unigram([*pieces, *((letter, -5.0) for letter in letters)], unk_id=0, byte_fallback=False)
    )
    pipeline.normalizer = normalizers.NFC()
    pipeline.pre_tokenizer = pre_tokenizers.Metaspace()
    pipeline.decoder = decoders.Metaspace()
    pipeline.add_special_tokens(["<unk>", "<s>", "</s>"])
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": False}
    return load_tokenizer(TokenizerSource("tokenizer.json", pipeline.to_str().encode(), config=config))


@pytest.fixture(
    params=["byte_level", "sentencepiece_gguf", "gemma_gguf", "metaspace", "unigram"], scope="session"
)
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer: Tokenizer = request.getfixturevalue(request.param)
    return tokenizer


@pytest.fixture(scope="session")
def default_metadata(default_model_path: Path) -> dict[str, Any]:
    """The default model's metadata, read by the gguf package."""
    from gguf import GGUFReader

    fields = GGUFReader(default_model_path).fields
    return {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}


@pytest.fixture(scope="session")
def default_tokenizer(default_metadata: dict[str, Any]) -> Tokenizer:
    return load_tokenizer(TokenizerSource("gguf", metadata=default_metadata))


@pytest.fixture(scope="session")
def chatml() -> str:
    return CHATML
