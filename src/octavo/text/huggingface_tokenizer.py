"""tokenizer.json (with tokenizer_config.json) -> Vocabulary, by the rules transformers applies to them.

The pipeline is the file's own, run by the tokenizers library. What the config adds: names for special tokens,
added tokens the file lacks, and whether prompts start with BOS. `clean_up_tokenization_spaces` is not applied:
for byte-level and SentencePiece vocabularies it damages text, and transformers ignores it there too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from octavo.errors import ModelFormatError
from octavo.text.pieces import compile_decoder
from octavo.text.vocabulary import Vocabulary, mark_special, special_ids

if TYPE_CHECKING:
    import tokenizers


def load_tokenizer_json(data: bytes, config: Mapping[str, Any]) -> Vocabulary:
    """`data`: the bytes of tokenizer.json. `config`: tokenizer_config.json.

    Raises ModelFormatError for a file that cannot be read, UnsupportedConfigError for a decoder that cannot be
    streamed.
    """
    import tokenizers

    try:
        pipeline = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises bare Exception
        raise _unreadable(str(error)) from error
    pipeline.no_truncation()
    pipeline.no_padding()
    decoder = compile_decoder(
        None if pipeline.decoder is None else json.loads(pipeline.decoder.__getstate__())
    )

    add_missing_tokens(pipeline, config)
    named = named_tokens(config)
    mark_special(pipeline, [*named.values(), *_extra_special_tokens(config)])
    unknown = _unknown_id(pipeline)
    eos: int | None = pipeline.token_to_id(named.get("eos_token", ""))
    return Vocabulary(
        pipeline=pipeline,
        size=max(pipeline.get_vocab().values(), default=-1) + 1,
        decoder=decoder,
        named_tokens=named,
        unknown_token_id=unknown,
        end_token_ids=frozenset() if eos is None else frozenset({eos}),
        prefix_token_ids=_prefix(pipeline, config, named),
        special_token_ids=special_ids(pipeline),
    )


def _spelling(value: Any) -> str | None:
    """A token in tokenizer_config.json: its text, or an object with its text as "content"."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a tokenizer_config.json names: {"bos_token": "<s>", ...}."""
    entries = {key: value for key, value in config.items() if key.endswith("_token")}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, Mapping):
        entries |= extra
    return {name: text for name, value in entries.items() if (text := _spelling(value)) is not None}


def _extra_special_tokens(config: Mapping[str, Any]) -> list[str]:
    """`additional_special_tokens` until transformers 4, `extra_special_tokens` since."""
    lists = [config.get("additional_special_tokens"), config.get("extra_special_tokens")]
    values = [value for entry in lists if isinstance(entry, list) for value in entry]
    return [text for value in values if (text := _spelling(value)) is not None]


def add_missing_tokens(pipeline: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Added tokens that older repositories list in the config only; their ids must come out as listed."""
    import tokenizers

    listed = config.get("added_tokens_decoder")
    if not isinstance(listed, Mapping):
        return
    known = pipeline.get_added_tokens_decoder()
    try:
        wanted = sorted((int(token_id), dict(entry)) for token_id, entry in listed.items())
    except (TypeError, ValueError) as error:
        raise _unreadable(f"added_tokens_decoder: {error}") from error
    for token_id, entry in wanted:
        text = _spelling(entry)
        if token_id in known or text is None:
            continue
        flags = {
            name: bool(entry.get(name, False))
            for name in ("special", "normalized", "lstrip", "rstrip", "single_word")
        }
        pipeline.add_tokens([tokenizers.AddedToken(text, **flags)])
        if pipeline.token_to_id(text) != token_id:
            raise _unreadable(
                f"added token {text!r} should have id {token_id} but gets {pipeline.token_to_id(text)}"
            )


def _unknown_id(pipeline: tokenizers.Tokenizer) -> int | None:
    """What the model itself makes of a character that no vocabulary has, unless it spells its bytes."""
    try:
        tokens = pipeline.model.tokenize("\U0010fffd")
    except Exception as error:  # the library raises bare Exception
        raise _unreadable(str(error)) from error
    return tokens[0].id if len(tokens) == 1 else None


def _prefix(
    pipeline: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]
) -> tuple[int, ...]:
    """What the file's post-processor puts before a text; if nothing, BOS where the config says so."""
    encoding = pipeline.encode("a", add_special_tokens=True)
    prefix = []
    for token_id, is_special in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
        if not is_special:
            break
        prefix.append(token_id)
    bos = named.get("bos_token")
    if not prefix and config.get("add_bos_token") is True and bos is not None:
        prefix.append(_bos_id(pipeline, bos))
    return tuple(prefix)


def _bos_id(pipeline: tokenizers.Tokenizer, bos: str) -> int:
    token_id: int | None = pipeline.token_to_id(bos)
    if token_id is None:
        raise _unreadable(f"prompts should start with {bos!r}, which is not in its vocabulary")
    return token_id


def _unreadable(reason: str) -> ModelFormatError:
    return ModelFormatError(
        f"tokenizer.json cannot be used: {reason}",
        remedy="Fetch the model again; if that does not help, the file may need a newer version of tokenizers.",
    )
