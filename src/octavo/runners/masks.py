"""Which tokens may come next, as the engine hands it to a runner: bits of words. Shape letter: V vocabulary."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def unpack_mask(words: NDArray[np.uint32], vocab_size: int) -> NDArray[np.bool_]:
    """uint32 [ceil(V / 32)], bit i % 32 of word i // 32 set where token i is allowed -> bool [V]."""
    bits = np.unpackbits(words.astype("<u4").view(np.uint8), count=vocab_size, bitorder="little")
    return bits.view(np.bool_)
