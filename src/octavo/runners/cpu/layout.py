"""Layouts `cpu-r8-1` and `cpu-r16-1`: rows of a matrix interleaved by 8 or 16, as csrc/kernels/linear.inc reads them.

A matrix is a sequence of blocks of R rows, each: scales [groups, R], minimums [groups, R], of two-level ones the
shared factors of both [ceil(K / 256), R], padding to 64 bytes, then codes; every block starts at a multiple of 64
bytes. Joint scales hold the minimums. Which types a block holds follows from the format alone (`encoding_of`), so a
reader needs no description beside the arrays.
Shape letters: N output rows, K input columns, R rows of a block (`lanes`), G group size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from octavo.models.parameters import Parameter
from octavo.quant.affine import BITSANDBYTES_STEP, Affine
from octavo.quant.codebook import Codebook
from octavo.quant.format import Bundle, Format, Packed
from octavo.quant.plain import Plain
from octavo.quant.scales import SUPER_COLUMNS
from octavo.runners.bundles import (
    ALIGNMENT_BYTES,
    VECTORS,
    bundle_name,
    padded_vector,
    part_name,
)
from octavo.runners.cpu.library import Codec, Numbers

_COLUMN_ORDER = np.array([0, 2, 1, 3])
"""Of 4 bytes of 8-bit codes: the low and the high bytes of 16-bit lanes are pairs of consecutive columns."""
_ARRANGE_VALUES = 1 << 20
_NUMBER_BYTES = {Numbers.F16: 2, Numbers.F32: 4, Numbers.U8: 1, Numbers.I8: 1, Numbers.F9Z7: 2}
_CODE_BITS = {
    **{Codec.PLAIN_F32: 32, Codec.PLAIN_F16: 16, Codec.PLAIN_BF16: 16},
    **{Codec.U8: 8, Codec.U8_MIN: 8, Codec.U4: 4, Codec.U4_MIN: 4, Codec.T4: 4},
}
_PLAIN_CODECS = {"f32": Codec.PLAIN_F32, "f16": Codec.PLAIN_F16, "bf16": Codec.PLAIN_BF16}


@dataclass(frozen=True, slots=True)
class Encoding:
    """How the blocks of one matrix of K columns hold its weights."""

    codec: Codec
    numbers: Numbers
    """Of scales and minimums."""
    group: int
    """Columns a scale covers: a multiple of 16; of plain values 0."""
    columns: int
    padded_columns: int
    """K rounded up to whole vectors of codes and whole groups of activations."""
    lanes: int

    @property
    def minimums(self) -> bool:
        return self.codec in (Codec.U8_MIN, Codec.U4_MIN)

    @property
    def joint(self) -> bool:
        """Scale and minimum in one number."""
        return self.numbers is Numbers.F9Z7

    @property
    def two_level(self) -> bool:
        return self.numbers in (Numbers.U8, Numbers.I8)

    @property
    def takes_int8(self) -> bool:
        """Whether int8 activations may be multiplied with it."""
        return self.codec in (Codec.U8, Codec.U8_MIN) and self.group % 32 == 0

    @property
    def header_bytes(self) -> int:
        if self.group == 0:
            return 0
        a_lane = -(-self.columns // self.group) * _NUMBER_BYTES[self.numbers]
        a_lane += 2 * -(-self.columns // SUPER_COLUMNS) if self.two_level else 0
        return _aligned(a_lane * self.lanes * (2 if self.minimums and not self.joint else 1))

    @property
    def block_bytes(self) -> int:
        return self.header_bytes + _aligned(self.padded_columns * self.lanes * _CODE_BITS[self.codec] // 8)

    def nbytes(self, rows: int) -> int:
        return -(-rows // self.lanes) * self.block_bytes


def encoding_of(format: Format, columns: int, lanes: int) -> Encoding | None:
    """The encoding of a matrix of that many columns; None: the kernels have none for this format."""
    if isinstance(format, Plain):
        return Encoding(_PLAIN_CODECS[format.dtype], Numbers.F32, 0, columns, columns, lanes)
    if not isinstance(format, Affine | Codebook):
        return None
    group = _round_up(columns, 64) if format.group_size is None else format.group_size
    if (
        group % 16
        or (isinstance(format, Affine) and format.ordered)
        or (isinstance(format, Codebook) and format.bits != 4)
    ):
        return None
    codec, numbers = _affine_codec(format) if isinstance(format, Affine) else (Codec.T4, _numbers_of(format))
    padded = _round_up(columns, next(n for n in (64, 32, 16) if group % n == 0))
    return Encoding(codec, numbers, group, columns, padded, lanes)


def _affine_codec(format: Affine) -> tuple[Codec, Numbers]:
    codec = Codec[f"U{format.bits}_MIN" if format.zero != "none" else f"U{format.bits}"]
    # What is computed when packed is not exact in less: a 127th of a scale, a zero times it.
    exact = format.scale_rule == "step" and format.zero != "integer"
    return codec, _numbers_of(format) if exact else Numbers.F32


def _numbers_of(format: Affine | Codebook) -> Numbers:
    return {
        "f16": Numbers.F16,
        "f32": Numbers.F32,
        "u8*f16": Numbers.U8,
        "i8*f16": Numbers.I8,
        "f9z7": Numbers.F9Z7,
    }[format.scales]


@dataclass(frozen=True, slots=True)
class CpuLayout:
    """q, k and v lie together, gate and up alternate block by block: their kernels read them in one stream."""

    lanes: int

    @property
    def id(self) -> str:
        return f"cpu-r{self.lanes}-1"

    def bundles(self, parameters: Sequence[Parameter]) -> tuple[Bundle, ...]:
        by_name: dict[str, list[Parameter]] = {}
        for parameter in parameters:
            by_name.setdefault(bundle_name(parameter), []).append(parameter)
        # Vectors last: small, and read whole.
        order = sorted(by_name, key=lambda name: name == VECTORS)
        return tuple(Bundle(name, tuple(by_name[name])) for name in order)

    def arrange(self, bundle: Bundle, packed: Sequence[tuple[Format, Packed]]) -> dict[str, np.ndarray]:
        if bundle.name == VECTORS:
            return {VECTORS: np.concatenate([padded_vector(arrays["values"]) for _, arrays in packed])}
        blocks = {
            part_name(parameter): _blocks(parameter, *formatted, self.lanes)
            for parameter, formatted in zip(bundle.parameters, packed, strict=True)
        }
        formats = [chosen for chosen, _ in packed]
        if alternate(bundle.parameters, formats):
            both = np.stack((blocks["gate"], blocks["up"]), axis=1)
            return {"gate_up": both.reshape(-1, both.shape[-1])}
        return blocks


def alternate(parameters: Sequence[Parameter], formats: Sequence[Format]) -> bool:
    """Whether a bundle is gate and up stored as the one array `gate_up`, block by block."""
    if [part_name(parameter) for parameter in parameters] != ["gate", "up"]:
        return False
    return formats[0] == formats[1] and parameters[0].shape == parameters[1].shape


def _blocks(parameter: Parameter, format: Format, arrays: Packed, lanes: int) -> np.ndarray:
    """uint8 [blocks, block_bytes] of one matrix."""
    rows, columns = parameter.shape
    encoding = encoding_of(format, columns, lanes)
    assert encoding is not None, f"{format.name} was declined"
    out = np.zeros((-(-rows // lanes), encoding.block_bytes), np.uint8)
    at_once = max(1, _ARRANGE_VALUES // (lanes * max(1, columns)))
    for first in range(0, len(out), at_once):
        part = format.select_rows(arrays, slice(first * lanes, min((first + at_once) * lanes, rows)))
        target = out[first : first + at_once]
        if isinstance(format, Affine | Codebook):
            _fill_codes(target, format, part, encoding)
        else:
            _fill_plain(target, part["values"], encoding)
    return out


def _fill_plain(out: np.ndarray, values: np.ndarray, encoding: Encoding) -> None:
    blocks = _in_blocks(values, len(out), encoding.lanes, values.shape[1])
    _put(out, 0, blocks.transpose(0, 2, 1))


def _fill_codes(out: np.ndarray, format: Affine | Codebook, arrays: Packed, encoding: Encoding) -> None:
    start = 0
    for table in _number_tables(format, arrays, encoding):
        blocks = _in_blocks(table, len(out), encoding.lanes, table.shape[1])
        start += _put(out, start, blocks.transpose(0, 2, 1))
    codes = arrays["codes"]
    if format.bits == 8:
        # Codes are stored with 128 added.
        codes = codes.view(np.uint8) ^ np.uint8(128)
        blocks = _in_blocks(codes, len(out), encoding.lanes, encoding.padded_columns)
        quads = blocks.reshape(*blocks.shape[:2], -1, 4)[..., _COLUMN_ORDER]
    else:
        blocks = _in_blocks(codes, len(out), encoding.lanes, encoding.padded_columns // 2)
        quads = _spread_nibbles(blocks.reshape(*blocks.shape[:2], -1, 4))
    _put(out, encoding.header_bytes, quads.transpose(0, 2, 1, 3))


def _number_tables(format: Affine | Codebook, arrays: Packed, encoding: Encoding) -> list[np.ndarray]:
    """[rows, groups] of scales and minimums, then what 256 columns share of each."""
    if encoding.joint:
        return [arrays["scales"]]
    if encoding.two_level:
        if not encoding.minimums:
            return [arrays["scales"], arrays["super_scales"]]
        # Stored so that the minimum is added.
        shared = [arrays["super_scales"], -arrays["super_minimums"]]
        return [arrays["scales"], arrays["minimums"], *shared]
    dtype = np.float16 if encoding.numbers is Numbers.F16 else np.float32
    scales = format.flat_scales(arrays)
    if isinstance(format, Affine) and format.scale_rule == "absmax":
        scales = scales * BITSANDBYTES_STEP
    minimums = format.flat_minimums(arrays) if encoding.minimums and isinstance(format, Affine) else None
    return [table.astype(dtype) for table in (scales, minimums) if table is not None]


def _spread_nibbles(pairs: np.ndarray) -> np.ndarray:
    """uint8 [..., 4], byte j of columns 2j and 2j + 1 -> nibble p of the 16-bit lane l of column 2p + l."""
    even, odd = pairs[..., 0::2], pairs[..., 1::2]
    low = (even & 15) | (odd << 4)
    high = (even >> 4) | (odd & 0xF0)
    return np.concatenate((low, high), axis=-1)


def _in_blocks(array: np.ndarray, blocks: int, lanes: int, columns: int) -> np.ndarray:
    """[rows, k <= columns] -> [blocks, lanes, columns], zeros beyond."""
    if array.shape == (blocks * lanes, columns):
        return array.reshape(blocks, lanes, columns)
    padded = np.zeros((blocks * lanes, columns), array.dtype)
    padded[: array.shape[0], : array.shape[1]] = array
    return padded.reshape(blocks, lanes, columns)


def _put(out: np.ndarray, start: int, values: np.ndarray) -> int:
    """Copy [blocks, ...] into the bytes of each block from `start`; returns how many bytes a block got."""
    flat = np.ascontiguousarray(values).reshape(len(out), -1).view(np.uint8)
    out[:, start : start + flat.shape[1]] = flat
    return flat.shape[1]


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _aligned(nbytes: int) -> int:
    return _round_up(nbytes, ALIGNMENT_BYTES)
