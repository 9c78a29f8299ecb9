"""The `tokenizer.ggml.*` metadata of a GGUF file -> Vocabulary.

Two models: "gpt2", byte-level BPE with the cuts named by `tokenizer.ggml.pre`, and "llama", SentencePiece BPE
with scores and byte fallback, rebuilt as merges (equal to sentencepiece's own encoder: both join the adjacent
pair whose result has the best score, the leftmost first). As in llama.cpp and transformers, text is not
Unicode-normalized, characters that a byte-level vocabulary cannot spell are dropped, and a dummy space comes
before every stretch of text that follows an added token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from octavo.errors import ModelFormatError, UnsupportedConfigError
from octavo.text.pieces import PieceDecoder
from octavo.text.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from octavo.text.sentencepiece_merges import merges_from_scores
from octavo.text.sentencepiece_model import PieceType
from octavo.text.stop_tokens import END_OF_TURN_TOKENS
from octavo.text.vocabulary import Vocabulary, mark_special, special_ids

if TYPE_CHECKING:
    import tokenizers

_NAMED_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # so spelled in the format
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}
_END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def load_gguf_tokenizer(metadata: Mapping[str, Any]) -> Vocabulary:
    """`metadata`: at least the `tokenizer.ggml.*` entries of the file.

    Raises ModelFormatError for entries that contradict each other, UnsupportedConfigError for a tokenizer that
    cannot be reproduced exactly, naming it.
    """
    entries = _Entries(metadata)
    match entries.text("model"):
        case "gpt2":
            return _byte_level(entries)
        case "llama":
            return _sentencepiece(entries)
        case other:
            raise UnsupportedConfigError(
                f"the file's tokenizer is {other!r}; Octavo reads 'gpt2' (byte-level BPE) and 'llama' "
                "(SentencePiece BPE) from GGUF.",
                remedy="Use the model's safetensors folder with its tokenizer.json instead.",
                key="tokenizer.ggml.model",
            )


class _Entries:
    """Checked access to the metadata, without its prefix."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self.tokens: Sequence[str] = self._list("tokens", str)
        types = metadata.get("tokenizer.ggml.token_type")
        count = len(self.tokens)
        self.types: Sequence[int] = (
            [PieceType.NORMAL] * count if types is None else [int(kind) for kind in types]
        )
        if len(self.types) != count:
            raise _damaged(f"{count} tokens but {len(self.types)} token types")
        self.ids = {token: token_id for token_id, token in enumerate(self.tokens)}
        if not count or len(self.ids) != count:
            raise _damaged(f"{count} tokens, of which {len(self.ids)} differ")

    def _list(self, key: str, kind: type) -> Sequence[Any]:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, Sequence) or not set(map(type, value)) <= {kind}:
            raise _damaged(f"tokenizer.ggml.{key} is not a list of {kind.__name__}")
        return value

    def merges(self) -> list[tuple[str, str]]:
        # Pairs, where the file is sound: `_pipeline` refuses anything else.
        return cast("list[tuple[str, str]]", [tuple(merge.split(" ")) for merge in self._list("merges", str)])

    def scores(self) -> list[float]:
        scores = self._metadata.get("tokenizer.ggml.scores")
        if scores is None or len(scores) != len(self.tokens):
            raise _damaged(f"{len(self.tokens)} tokens but {0 if scores is None else len(scores)} scores")
        return [float(score) for score in scores]

    def text(self, key: str) -> str | None:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        return value if isinstance(value, str) else None

    def flag(self, key: str, default: bool) -> bool:
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        return default if value is None else bool(value)

    def token_id(self, key: str) -> int | None:
        """None where absent or, as some converters write it, outside the vocabulary."""
        value = self._metadata.get(f"tokenizer.ggml.{key}")
        return int(value) if value is not None and 0 <= int(value) < len(self.tokens) else None

    def of_type(self, *kinds: int) -> Iterable[str]:
        wanted = set(map(int, kinds))  # many times faster to look into than a tuple of an enum
        return (token for token, kind in zip(self.tokens, self.types, strict=True) if kind in wanted)

    def is_of_type(self, token: str, *kinds: int) -> bool:
        return token in self.ids and self.types[self.ids[token]] in kinds


def _byte_level(entries: _Entries) -> Vocabulary:
    import tokenizers

    recipe, notices = _recipe(entries.text("pre"))
    pipeline = _pipeline(
        vocab=entries.ids,
        merges=entries.merges(),
        ignore_merges=recipe.ignore_merges,
    )
    cuts = [
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(cut), behavior="isolated") for cut in recipe.cuts
    ]
    to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pipeline.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*cuts, to_bytes])
    _add_tokens(pipeline, entries)
    return _vocabulary(
        entries, pipeline, PieceDecoder(byte_level=True), adds_bos=recipe.adds_bos, notices=notices
    )


def _recipe(name: str | None) -> tuple[PreTokenizer, tuple[str, ...]]:
    if name in {None, "", "default"}:
        notice = (
            "the GGUF file does not name its pre-tokenizer: llama.cpp's default is used, and text may be cut "
            "into other tokens than in training (newer conversions of the model name it)"
        )
        return PRE_TOKENIZERS["default"], (notice,)
    recipe = PRE_TOKENIZERS.get(str(name))
    if recipe is None:
        raise UnsupportedConfigError(
            f"the file's pre-tokenizer {name!r} is not known to Octavo: text would be cut into wrong tokens",
            remedy="Use the model's safetensors folder with its tokenizer.json instead.",
            key="tokenizer.ggml.pre",
        )
    return recipe, ()


def _sentencepiece(entries: _Entries) -> Vocabulary:
    import tokenizers

    if entries.flag("remove_extra_whitespaces", False):
        raise UnsupportedConfigError(
            "the file's SentencePiece tokenizer removes extra whitespace, which Octavo does not reproduce",
            remedy="Use the model's safetensors folder with its tokenizer.json instead.",
            key="tokenizer.ggml.remove_extra_whitespaces",
        )
    adds_space = entries.flag("add_space_prefix", True)
    if adds_space and not all(token.strip(" ") for token in entries.of_type(PieceType.USER_DEFINED)):
        raise UnsupportedConfigError(
            "the file's SentencePiece tokenizer has runs of spaces as tokens and also puts a space before every "
            "text, which Octavo does not reproduce",
            remedy="Use the model's safetensors folder with its tokenizer.json instead.",
            key="tokenizer.ggml.add_space_prefix",
        )
    # Runs of spaces are stored as spaces, and looked up as U+2581 like every other piece.
    pieces = [
        token.replace(" ", "▁") if kind == PieceType.USER_DEFINED and not token.strip(" ") else token
        for token, kind in zip(entries.tokens, entries.types, strict=True)
    ]
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    unknown = entries.token_id("unknown_token_id")
    pipeline = _pipeline(
        vocab=vocab,
        merges=merges_from_scores(pieces, entries.types, entries.scores()),
        byte_fallback=True,
        fuse_unk=True,
        unk_token=None if unknown is None else pieces[unknown],
    )
    space = tokenizers.normalizers.Replace(" ", "▁")
    prefix = [tokenizers.normalizers.Prepend("▁")] if adds_space else []
    pipeline.normalizer = tokenizers.normalizers.Sequence([*prefix, space])
    _add_tokens(pipeline, entries)
    decoder = PieceDecoder(
        byte_fallback=True, replacements=(("▁", " "),), leading_spaces=1 if adds_space else 0
    )
    return _vocabulary(entries, pipeline, decoder, adds_bos=True, unknown_token_id=unknown)


def _pipeline(
    *, vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any
) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        return tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges, **options))
    except Exception as error:  # the library raises bare Exception
        raise _damaged(str(error)) from error


def _add_tokens(pipeline: tokenizers.Tokenizer, entries: _Entries) -> None:
    """Control tokens become special; user-defined ones are matched whole, and are text."""
    import tokenizers

    pipeline.add_tokens(
        [
            # Normalized, so that a run of spaces is found after spaces have become U+2581.
            tokenizers.AddedToken(token.replace(" ", "▁"), normalized=True)
            if pipeline.normalizer is not None and not token.strip(" ")
            else tokenizers.AddedToken(token, normalized=False)
            for token in entries.of_type(PieceType.USER_DEFINED)
        ]
    )
    # An end of turn that a converter left unmarked is a control token all the same, as in llama.cpp.
    unmarked = [
        token
        for token in sorted(END_OF_TURN_TOKENS)
        if entries.is_of_type(token, PieceType.USER_DEFINED, PieceType.NORMAL)
    ]
    mark_special(pipeline, [*entries.of_type(PieceType.CONTROL, PieceType.UNKNOWN), *unmarked])


def _vocabulary(
    entries: _Entries,
    pipeline: tokenizers.Tokenizer,
    decoder: PieceDecoder,
    *,
    adds_bos: bool,
    unknown_token_id: int | None = None,
    notices: tuple[str, ...] = (),
) -> Vocabulary:
    bos = entries.token_id("bos_token_id")
    ids = {name: entries.token_id(key) for name, key in _NAMED_IDS.items()}
    ends = (entries.token_id(key) for key in _END_IDS)
    return Vocabulary(
        pipeline=pipeline,
        size=len(entries.tokens),
        decoder=decoder,
        unknown_token_id=unknown_token_id,
        named_tokens={
            name: entries.tokens[token_id] for name, token_id in ids.items() if token_id is not None
        },
        end_token_ids=frozenset(token_id for token_id in ends if token_id is not None),
        prefix_token_ids=(bos,) if bos is not None and entries.flag("add_bos_token", adds_bos) else (),
        special_token_ids=special_ids(pipeline),
        notices=notices,
    )


def _damaged(reason: str) -> ModelFormatError:
    return ModelFormatError(
        f"the file's tokenizer metadata is damaged: {reason}",
        remedy="Fetch the file again, or use another conversion of the model.",
    )
