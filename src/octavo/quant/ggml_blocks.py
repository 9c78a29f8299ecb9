"""The blocks of GGUF's tensors taken apart, exactly: which Format each type is, and where its numbers stand.

Little endian, as in ggml-common.h; h marks bits of a code beyond its low ones, numbers in () are columns:

| type         | bytes | fields                                                                              |
|--------------|-------|-------------------------------------------------------------------------------------|
| q4_0 iq4_nl  | 18    | f16 d; u8 q[16]: column i low, i + 16 high                                          |
| q4_1         | 20    | f16 d; f16 m; q as q4_0                                                             |
| q5_0, q5_1   | 22 24 | f16 d; (f16 m;) u32 h: bit i of column i; q as q4_0                                 |
| q8_0         | 34    | f16 d; i8 q[32]                                                                     |
| q2_k (256)   | 84    | u8 s[16]: scale low, minimum high; u8 q[64]; f16 d; f16 dmin                        |
| q3_k (256)   | 110   | u8 h[32]; u8 q[64]; u8 s[12]: 6 bits each, 32 is 0; f16 d                           |
| q4_k (256)   | 144   | f16 d; f16 dmin; u8 s[12]: 6-bit scales and minimums; u8 q[128]                     |
| q5_k (256)   | 176   | f16 d; f16 dmin; u8 s[12]; u8 h[32]; u8 q[128]                                      |
| q6_k (256)   | 210   | u8 q[128]; u8 h[64]; i8 s[16]; f16 d                                                |
| iq4_xs (256) | 136   | f16 d; u16 sh; u8 sl[4]: 6-bit scales, 32 is 0; u8 q[128]: 8 times q4_0's           |

Shape letters: N output rows, K input columns, B blocks of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from octavo.errors import ModelFormatError
from octavo.quant.affine import Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, Affine
from octavo.quant.codebook import IQ4_NL, IQ4_XS, Codebook
from octavo.quant.nibbles import join_nibbles
from octavo.quant.plain import require_finite
from octavo.quant.rows import row_blocks


@dataclass(frozen=True, slots=True)
class BlockType:
    format: Affine | Codebook
    columns: int
    nbytes: int
    codes: Callable[[np.ndarray], np.ndarray]
    """Blocks uint8 [N, B, nbytes] -> the format's codes, one a column: uint8 or int8 [N, B, columns]."""
    numbers: Callable[[np.ndarray], dict[str, np.ndarray]]
    """Blocks -> the format's other arrays, [N, B] or [N, B, groups of a block]."""

    def split(self, raw: np.ndarray, columns: int) -> dict[str, np.ndarray]:
        """Raw rows uint8 [N, bytes a row] -> the arrays of the format.

        Raises ModelFormatError where rows have another width, or a scale or minimum is not finite.
        """
        blocks = self._blocks(raw, columns)
        rows = len(raw)
        packed = {name: np.ascontiguousarray(n).reshape(rows, -1) for name, n in self.numbers(blocks).items()}
        nibbles = self.format.bits == 4
        signed = isinstance(self.format, Affine) and not nibbles
        codes = np.empty((rows, columns // 2 if nibbles else columns), np.int8 if signed else np.uint8)
        for part in row_blocks((rows, columns)):
            found = self.codes(blocks[part]).reshape(part.stop - part.start, columns)
            codes[part] = join_nibbles(found) if nibbles else found
        return {"codes": codes} | packed

    def _blocks(self, raw: np.ndarray, columns: int) -> np.ndarray:
        count, rest = divmod(columns, self.columns)
        if rest or raw.dtype != np.uint8 or raw.shape[1:] != (count * self.nbytes,):
            raise ModelFormatError(
                f"rows of {columns} values in blocks of {self.columns} values and {self.nbytes} bytes "
                f"came as {raw.dtype} {list(raw.shape)}",
                remedy="The file is damaged: fetch it again.",
            )
        return raw.reshape(len(raw), count, self.nbytes)


def _float16(blocks: np.ndarray, start: int) -> np.ndarray:
    """float16 [N, B] from the byte `start` of each block."""
    values = np.ascontiguousarray(blocks[..., start : start + 2]).view(np.float16)[..., 0]
    require_finite(values, "f16")
    return values


def _halves(q: np.ndarray) -> np.ndarray:
    """uint8 [..., n], column i low and i + n high -> [..., 2 n] codes of 4 bits."""
    return np.concatenate((q & 15, q >> 4), axis=-1)


def _bit_planes(q: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [..., n], column p n + i in the p-th `bits` bits of byte i -> [..., 8 / bits * n] codes."""
    return np.concatenate([q >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], axis=-1)


def _runs(q: np.ndarray, length: int) -> np.ndarray:
    """uint8 [N, B, n] -> [N, B, n / length, length]."""
    return q.reshape(*q.shape[:-1], -1, length)


def _joined(q: np.ndarray) -> np.ndarray:
    return q.reshape(*q.shape[:2], -1)


# --- blocks of 32 ------------------------------------------------------------------------------------


def _d(blocks: np.ndarray) -> dict[str, np.ndarray]:
    return {"scales": _float16(blocks, 0)}


def _d_m(blocks: np.ndarray) -> dict[str, np.ndarray]:
    return {"scales": _float16(blocks, 0), "minimums": _float16(blocks, 2)}


def _q5_codes(blocks: np.ndarray, start: int) -> np.ndarray:
    fifth = np.unpackbits(blocks[..., start : start + 4], axis=-1, bitorder="little")
    codes: np.ndarray = _halves(blocks[..., start + 4 :]) | fifth << 4
    return codes


def _q5_0_codes(blocks: np.ndarray) -> np.ndarray:
    codes: np.ndarray = _q5_codes(blocks, 2).view(np.int8) - np.int8(16)
    return codes


def _q8_0_codes(blocks: np.ndarray) -> np.ndarray:
    return blocks[..., 2:].view(np.int8)


# --- blocks of 256 -----------------------------------------------------------------------------------


def _q2_k_numbers(blocks: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "scales": blocks[..., :16] & 15,
        "super_scales": _float16(blocks, 80),
        "minimums": blocks[..., :16] >> 4,
        "super_minimums": _float16(blocks, 82),
    }


def _q2_k_codes(blocks: np.ndarray) -> np.ndarray:
    return _joined(_bit_planes(_runs(blocks[..., 16:80], 32), 2))


def _q3_k_numbers(blocks: np.ndarray) -> dict[str, np.ndarray]:
    low = _halves(blocks[..., 96:104])
    scales = low | _bit_planes(blocks[..., 104:108], 2) << 4
    return {"scales": scales.view(np.int8) - np.int8(32), "super_scales": _float16(blocks, 108)}


def _q3_k_codes(blocks: np.ndarray) -> np.ndarray:
    low = _joined(_bit_planes(_runs(blocks[..., 32:96], 32), 2))
    third = _bit_planes(blocks[..., :32], 1)
    # -4..3, the third bit set for what is not negative; kept with the 8 of 4-bit codes added.
    codes: np.ndarray = low + np.uint8(4) + (third << 2)
    return codes


def _six_bits(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, B, 12] -> 8 scales and 8 minimums."""
    scales, minimums, low = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    return (
        np.concatenate((scales & 63, low & 15 | scales >> 6 << 4), axis=-1),
        np.concatenate((minimums & 63, low >> 4 | minimums >> 6 << 4), axis=-1),
    )


def _q4_k_numbers(blocks: np.ndarray) -> dict[str, np.ndarray]:
    scales, minimums = _six_bits(blocks[..., 4:16])
    return {
        "scales": scales,
        "super_scales": _float16(blocks, 0),
        "minimums": minimums,
        "super_minimums": _float16(blocks, 2),
    }


def _q4_k_codes(blocks: np.ndarray) -> np.ndarray:
    return _joined(_halves(_runs(blocks[..., 16:], 32)))


def _q5_k_codes(blocks: np.ndarray) -> np.ndarray:
    fifth = _bit_planes(blocks[..., 16:48], 1)
    codes: np.ndarray = _joined(_halves(_runs(blocks[..., 48:], 32))) | fifth << 4
    return codes


def _q6_k_numbers(blocks: np.ndarray) -> dict[str, np.ndarray]:
    return {"scales": blocks[..., 192:208].view(np.int8), "super_scales": _float16(blocks, 208)}


def _q6_k_codes(blocks: np.ndarray) -> np.ndarray:
    low = _joined(_halves(_runs(blocks[..., :128], 64)))
    high = _joined(_bit_planes(_runs(blocks[..., 128:192], 32), 2))
    codes: np.ndarray = (low | high << 4).view(np.int8) - np.int8(32)
    return codes


def _iq4_xs_numbers(blocks: np.ndarray) -> dict[str, np.ndarray]:
    low = np.stack((blocks[..., 4:8] & 15, blocks[..., 4:8] >> 4), axis=-1).reshape(*blocks.shape[:2], 8)
    high = np.stack([blocks[..., 2:4] >> shift & 3 for shift in range(0, 8, 2)], axis=-1)
    scales = low | high.reshape(*blocks.shape[:2], 8) << 4
    return {"scales": scales.view(np.int8) - np.int8(32), "super_scales": _float16(blocks, 0)}


def _iq4_xs_codes(blocks: np.ndarray) -> np.ndarray:
    return _joined(_halves(_runs(blocks[..., 8:], 16)))


BLOCK_TYPES: Mapping[str, BlockType] = {
    "q4_0": BlockType(Q4_0, 32, 18, lambda blocks: _halves(blocks[..., 2:]), _d),
    "q4_1": BlockType(Q4_1, 32, 20, lambda blocks: _halves(blocks[..., 4:]), _d_m),
    "q5_0": BlockType(Q5_0, 32, 22, _q5_0_codes, _d),
    "q5_1": BlockType(Q5_1, 32, 24, lambda blocks: _q5_codes(blocks, 4), _d_m),
    "q8_0": BlockType(Q8_0, 32, 34, _q8_0_codes, _d),
    "q2_k": BlockType(Q2_K, 256, 84, _q2_k_codes, _q2_k_numbers),
    "q3_k": BlockType(Q3_K, 256, 110, _q3_k_codes, _q3_k_numbers),
    "q4_k": BlockType(Q4_K, 256, 144, _q4_k_codes, _q4_k_numbers),
    "q5_k": BlockType(Q5_K, 256, 176, _q5_k_codes, _q4_k_numbers),
    "q6_k": BlockType(Q6_K, 256, 210, _q6_k_codes, _q6_k_numbers),
    "iq4_nl": BlockType(IQ4_NL, 32, 18, lambda blocks: _halves(blocks[..., 2:]), _d),
    "iq4_xs": BlockType(IQ4_XS, 256, 136, _iq4_xs_codes, _iq4_xs_numbers),
}
"""By the name of `octavo.sources.ggml_types`."""
