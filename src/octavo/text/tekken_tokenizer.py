"""tekken.json (Mistral's own format, a tiktoken BPE) -> Vocabulary, for repositories without a tokenizer.json.

The file lists byte strings by rank; two neighbours are joined where the result has the lowest rank. Ids count
special tokens first. As mistral-common does, prompts start with BOS.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.errors import ModelFormatError
from octavo.text.huggingface_tokenizer import named_tokens
from octavo.text.pieces import PieceDecoder, byte_alphabet
from octavo.text.vocabulary import Vocabulary, mark_special, special_ids

_DEFAULT_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
"""Of files from before version v7, which do not list them."""


_MAX_PIECE_BYTES = 512
"""Mistral's longest is 128 spaces; the ways to cut a piece, and the text to look them up, grow with its square."""
_MAX_SPECIAL = 1 << 20
"""Each unnamed one gets a name: the number that a file states must not decide how much that is."""


def load_tekken(data: bytes, config: Mapping[str, Any]) -> Vocabulary:
    """`data`: the bytes of tekken.json. `config`: tokenizer_config.json, if there is one.

    Raises ModelFormatError for a file that cannot be read.
    """
    import tokenizers

    try:
        file = json.loads(data)
        settings = file["config"]
        specials = int(settings["default_num_special_tokens"])
        size = int(settings["default_vocab_size"])
        if not 0 <= specials <= min(size, _MAX_SPECIAL):
            raise ValueError(
                f"{specials} special tokens in a vocabulary of {size}; at most {_MAX_SPECIAL} can be read"
            )
        pattern = str(settings["pattern"])
        ranked = sorted(file["vocab"], key=lambda entry: int(entry["rank"]))
        if [int(entry["rank"]) for entry in ranked] != list(range(len(ranked))):
            raise ValueError("ranks are not 0, 1, 2, ...")
        pieces = [base64.b64decode(entry["token_bytes"], validate=True) for entry in ranked]
        longest = max(map(len, pieces), default=0)
        if longest > _MAX_PIECE_BYTES:
            raise ValueError(f"a token of {longest} bytes; at most {_MAX_PIECE_BYTES} can be read")
        names = _special_names(file.get("special_tokens"), specials)
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise _unusable(f"{type(error).__name__}: {error}") from error
    pieces = pieces[: size - specials]
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    spelled = ["".join(letters[byte] for byte in piece) for piece in pieces]
    vocab = {name: token_id for token_id, name in enumerate(names)}
    vocab |= {piece: specials + rank for rank, piece in enumerate(spelled)}
    if len(vocab) != len(names) + len(spelled):
        raise _unusable("two of its tokens are equal")
    try:
        pipeline = tokenizers.Tokenizer(
            # A piece that is in the vocabulary as a whole is taken as such: tiktoken looks there first.
            tokenizers.models.BPE(vocab=vocab, merges=_merges(spelled), ignore_merges=True)
        )
        cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    except Exception as error:  # the library raises bare Exception
        raise _unusable(str(error)) from error
    to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pipeline.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([cut, to_bytes])
    mark_special(pipeline, names)
    own = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    named = {**{name: text for name, text in own.items() if text in vocab}, **named_tokens(config)}
    eos, bos = (vocab.get(named.get(name, "")) for name in ("eos_token", "bos_token"))
    return Vocabulary(
        pipeline=pipeline,
        size=size,
        decoder=PieceDecoder(byte_level=True),
        named_tokens=named,
        unknown_token_id=None,
        end_token_ids=frozenset() if eos is None else frozenset({eos}),
        prefix_token_ids=() if bos is None or config.get("add_bos_token") is False else (bos,),
        special_token_ids=special_ids(pipeline),
    )


def _special_names(listed: Any, count: int) -> list[str]:
    """The spelling of each special id; unnamed ones are <SPECIAL_n>, as mistral-common calls them."""
    names = dict(enumerate(_DEFAULT_SPECIAL)) if listed is None else {}
    for entry in listed or ():
        names[int(entry["rank"])] = str(entry["token_str"])
    if max(names, default=-1) >= count:
        raise ValueError(f"a special token of rank {max(names)}, where there are {count}")
    return [names.get(rank, f"<SPECIAL_{rank}>") for rank in range(count)]


def _merges(pieces: Sequence[str]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, in the order of the third's rank."""
    rank = {piece: number for number, piece in enumerate(pieces)}
    merges = []
    for piece in pieces:
        known = [
            (left, right)
            for cut in range(1, len(piece))
            if (left := piece[:cut]) in rank and (right := piece[cut:]) in rank
        ]
        merges += sorted(known, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    return merges


def _unusable(reason: str) -> ModelFormatError:
    return ModelFormatError(f"tekken.json cannot be used: {reason}", remedy="Fetch the model again.")
