"""A SentencePiece BPE's pieces and scores -> the list of merges that joins text into the same pieces.

Both encoders join the adjacent pair whose result has the best score, the leftmost first.
"""

from __future__ import annotations

from collections.abc import Sequence

from octavo.text.sentencepiece_model import PieceType


def merges_from_scores(
    pieces: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score first.

    Only normal pieces take part: sentencepiece never joins text into a control, byte or user-defined piece.
    """
    normal = {
        piece: token_id
        for token_id, (piece, kind) in enumerate(zip(pieces, types, strict=True))
        if kind == PieceType.NORMAL
    }
    merges = []
    for piece, token_id in normal.items():
        rank = -scores[token_id]
        for cut in range(1, len(piece)):
            left = piece[:cut]
            if left in normal and (right := piece[cut:]) in normal:
                merges.append((rank, token_id, cut, left, right))
    merges.sort()
    return [(left, right) for _, _, _, left, right in merges]
