"""tokenizer.model (SentencePiece, BPE or unigram) -> Vocabulary, for repositories without a tokenizer.json.

The ids are those of sentencepiece's own encoder. What the model's file cannot say (BOS in front of a prompt,
tokens added later) comes from tokenizer_config.json, read by the rules for tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from octavo.errors import ModelFormatError, UnsupportedConfigError
from octavo.text.huggingface_tokenizer import add_missing_tokens, named_tokens
from octavo.text.pieces import PieceDecoder
from octavo.text.sentencepiece_merges import merges_from_scores
from octavo.text.sentencepiece_model import PieceType, SentencePieceModel, parse_sentencepiece
from octavo.text.vocabulary import Vocabulary, mark_special, special_ids

if TYPE_CHECKING:
    import tokenizers

_SPACE = "▁"
_ADDS_BOS = ("Llama", "CodeLlama", "Gemma", "Mistral", "InternLM", "Baichuan")
"""Starts of `tokenizer_class` names whose tokenizers put BOS in front unless told otherwise; so does no class."""


def load_sentencepiece(data: bytes, config: Mapping[str, Any]) -> Vocabulary:
    """`data`: the bytes of tokenizer.model. `config`: tokenizer_config.json.

    Raises ModelFormatError for a damaged file, UnsupportedConfigError for a model that cannot be reproduced.
    """
    import tokenizers

    model = parse_sentencepiece(data)
    if len(set(model.pieces)) != len(model.pieces):
        raise _unusable("two of its pieces are equal")
    if model.whitespace_as_suffix:
        raise UnsupportedConfigError(
            "the SentencePiece model puts spaces behind words, which Octavo does not reproduce",
            remedy="Convert it to a tokenizer.json with transformers' AutoTokenizer.",
            key="treat_whitespace_as_suffix",
        )
    pipeline = tokenizers.Tokenizer(_model(model))
    pipeline.normalizer = _normalizer(model)
    if user_defined := _of_type(model, PieceType.USER_DEFINED):
        # Found after spaces have become U+2581, as sentencepiece does: "▁▁" is one of them at times.
        pipeline.add_tokens([tokenizers.AddedToken(piece, normalized=True) for piece in user_defined])
    mark_special(pipeline, [*_of_type(model, PieceType.CONTROL), *_of_type(model, PieceType.UNKNOWN)])
    add_missing_tokens(pipeline, config)
    own = {"bos_token": model.bos_id, "eos_token": model.eos_id, "unk_token": model.unk_id}
    named = {
        **{name: model.pieces[i] for name, i in own.items() if 0 <= i < len(model.pieces)},
        **named_tokens(config),
    }
    mark_special(pipeline, named.values())
    eos: int | None = pipeline.token_to_id(named.get("eos_token", ""))
    return Vocabulary(
        pipeline=pipeline,
        size=max(pipeline.get_vocab().values()) + 1,
        decoder=PieceDecoder(
            byte_fallback=model.byte_fallback,
            replacements=((_SPACE, " "),),
            leading_spaces=1 if model.add_dummy_prefix else 0,
        ),
        named_tokens=named,
        unknown_token_id=model.unk_id if 0 <= model.unk_id < len(model.pieces) else None,
        end_token_ids=frozenset() if eos is None else frozenset({eos}),
        prefix_token_ids=_prefix(pipeline, config, named),
        special_token_ids=special_ids(pipeline),
    )


def _model(model: SentencePieceModel) -> tokenizers.models.Model:
    import tokenizers

    unknown = model.unk_id if 0 <= model.unk_id < len(model.pieces) else None
    try:
        if model.algorithm == "bpe":
            return tokenizers.models.BPE(
                vocab={piece: token_id for token_id, piece in enumerate(model.pieces)},
                merges=merges_from_scores(model.pieces, model.types, model.scores),
                byte_fallback=model.byte_fallback,
                fuse_unk=True,
                unk_token=None if unknown is None else model.pieces[unknown],
            )
        if model.algorithm == "unigram":
            return tokenizers.models.Unigram(
                _unigram_scores(model), unk_id=unknown, byte_fallback=model.byte_fallback
            )
    except ModelFormatError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise _unusable(str(error)) from error
    raise UnsupportedConfigError(
        f"the SentencePiece model splits text by {model.algorithm!r}; Octavo reproduces bpe and unigram",
        remedy="Convert it to a tokenizer.json with transformers' AutoTokenizer.",
        key="model_type",
    )


def _unigram_scores(model: SentencePieceModel) -> list[tuple[str, float]]:
    """Pieces that text is never split into get a score that no split can afford."""
    never = min(model.scores) - 100.0 * len(model.pieces)
    return [
        (piece, score if kind in (PieceType.NORMAL, PieceType.USER_DEFINED) else never)
        for piece, score, kind in zip(model.pieces, model.scores, model.types, strict=True)
    ]


def _normalizer(model: SentencePieceModel) -> tokenizers.normalizers.Normalizer:
    import tokenizers
    from tokenizers import normalizers

    steps: list[normalizers.Normalizer] = []
    if model.precompiled_charsmap:
        try:
            steps.append(normalizers.Precompiled(model.precompiled_charsmap))
        except Exception as error:
            raise _unusable(f"its character map: {error}") from error
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(tokenizers.Regex("^ +| +$"), ""))
        steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _prefix(
    pipeline: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]
) -> tuple[int, ...]:
    stated = config.get("add_bos_token")
    tokenizer_class = config.get("tokenizer_class")
    adds = stated if isinstance(stated, bool) else str(tokenizer_class or "Llama").startswith(_ADDS_BOS)
    bos: int | None = pipeline.token_to_id(named.get("bos_token", ""))
    return (bos,) if adds and bos is not None else ()


def _of_type(model: SentencePieceModel, kind: PieceType) -> list[str]:
    return [piece for piece, each in zip(model.pieces, model.types, strict=True) if each == kind]


def _unusable(reason: str) -> ModelFormatError:
    return ModelFormatError(f"tokenizer.model cannot be used: {reason}", remedy="Fetch the model again.")
