"""A SentencePiece BPE's pieces and scores -> the list of merges that joins text into the same pieces.

Both encoders join the adjacent pair whose result has the best score, the leftmost first.
"""

from __future__ import annotations

from collections.abc import Sequence

from octavo.errors import ModelFormatError
from octavo.text.sentencepiece_model import PieceType

_MAX_PIECE_CHARACTERS = 512
"""sentencepiece trains pieces of 16 by default; the text of all cuts of a piece grows with its square."""


def merges_from_scores(
    pieces: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score first.

    Only normal pieces take part: sentencepiece never joins text into a control, byte or user-defined piece.
    Raises ModelFormatError for a piece too long to be one of a real model.
    """
    normal = {
        piece: token_id
        for token_id, (piece, kind) in enumerate(zip(pieces, types, strict=True))
        if kind == PieceType.NORMAL
    }
    merges = []
    for piece, token_id in normal.items():
        if len(piece) > _MAX_PIECE_CHARACTERS:
            raise ModelFormatError(
                f"the tokenizer's token {token_id} has {len(piece)} characters; "
                f"at most {_MAX_PIECE_CHARACTERS} can be read",
                remedy="Fetch the model again.",
            )
        rank = -scores[token_id]
        for cut in range(1, len(piece)):
            left = piece[:cut]
            if left in normal and (right := piece[cut:]) in normal:
                merges.append((rank, token_id, cut, left, right))
    merges.sort()
    return [(left, right) for _, _, _, left, right in merges]
