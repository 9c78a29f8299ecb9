"""A packed model on the device: matrices as their layout stores them, norms with their offset added, rope tables.

Weights go from the mapped cache to the device piece by piece (`upload`), so the host holds no copy.
Shape letters: N output rows, K input columns, C padded columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from octavo.errors import IncompatibleModelError
from octavo.models.parameters import Parameter
from octavo.models.spec import DenseMLP, LayerSpec, ModelSpec, Norm, Rope
from octavo.quant.codebook import Codebook
from octavo.quant.format import Format
from octavo.runners.bundles import VECTORS, bundle_name, part_name, vector_places
from octavo.runners.cuda.layout import Encoding, encoding_of, padded
from octavo.runners.cuda.upload import Uploads
from octavo.weights import StoredBundle, WeightStore

_PLAIN_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
_SCALE_DTYPES = {
    "f16": torch.float16,
    "f32": torch.float32,
    "u8*f16": torch.uint8,
    "i8*f16": torch.int8,
    "f9z7": torch.int16,
}


@dataclass(frozen=True, slots=True)
class Matrix:
    """[N, C] as stored; `codes` and `scales` have the element type that kernels load."""

    encoding: Encoding
    rows: int
    columns: int
    """C."""
    codes: torch.Tensor
    """Integer codes as int32 words, plain values as they are."""
    scales: torch.Tensor
    """fp16 or fp32, or bytes of two-level ones, as the layout says; empty for plain values."""
    bias: torch.Tensor | None
    """fp32 [N]."""
    table: torch.Tensor | None = None
    """fp32 [16] of a codebook."""

    @property
    def elements(self) -> torch.Tensor:
        """Codes one by one, for kernels that take single columns: int8, uint8 (two of them), or values."""
        if self.encoding.codec in ("i8", "i8m"):
            return self.codes.view(torch.int8)
        return self.codes if self.encoding.codec in _PLAIN_DTYPES else self.codes.view(torch.uint8)

    @property
    def table_or_codes(self) -> torch.Tensor:
        """The table, or anything where there is none: kernels take a pointer all the same."""
        return self.codes if self.table is None else self.table

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(frozen=True, slots=True)
class Linear:
    """Matrices under one another with the same input: one, unless their formats differ."""

    parts: tuple[Matrix, ...]
    members: tuple[tuple[str, int], ...] = ()
    """Parameters that are its rows, and how many: what adapters can add to. None of a tied head."""
    input_columns: int = 0
    """K."""

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def columns(self) -> int:
        return self.parts[0].columns

    @property
    def takes_values(self) -> bool:
        return self.parts[0].encoding.takes_values

    @property
    def is_int8(self) -> bool:
        return all(part.encoding.is_int8 for part in self.parts)


@dataclass(frozen=True, slots=True)
class DeviceNorm:
    kind: str
    eps: float
    gain: torch.Tensor
    """offset + w, fp32 [K]."""
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class DeviceLayer:
    spec: LayerSpec
    qkv: Linear
    o: Linear
    gate_up: Linear
    """gate over up; up alone where the block is not gated."""
    down: Linear
    pre_mixer: DeviceNorm | None
    post_mixer: DeviceNorm | None
    pre_ffn: DeviceNorm | None
    post_ffn: DeviceNorm | None
    q_norm: DeviceNorm | None
    k_norm: DeviceNorm | None
    cosines: torch.Tensor | None
    """fp32 [context, rotary_dim / 2], shared by layers of the same rope."""
    sines: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class DeviceModel:
    spec: ModelSpec
    embedding: Matrix
    layers: tuple[DeviceLayer, ...]
    final_norm: DeviceNorm
    head: Linear
    nbytes: int

    @property
    def linears(self) -> tuple[Linear, ...]:
        layers = (x for layer in self.layers for x in (layer.qkv, layer.o, layer.gate_up, layer.down))
        return (*layers, self.head)

    @property
    def has_int8_layers(self) -> bool:
        """Whether a layer's linear has int8 weights; embedding and head often do beside 4 bits."""
        return any(linear.is_int8 for linear in self.linears[:-1])


def load_model(
    spec: ModelSpec, weights: WeightStore, context_tokens: int, device: torch.device
) -> DeviceModel:
    """Copies every bundle to the device and releases it."""
    with Uploads(device) as uploads:
        return _Loader(spec, weights, context_tokens, uploads, device).load()


class _Loader:
    def __init__(
        self,
        spec: ModelSpec,
        weights: WeightStore,
        context_tokens: int,
        uploads: Uploads,
        device: torch.device,
    ) -> None:
        self._spec = spec
        self._weights = weights
        self._context_tokens = context_tokens
        self._uploads = uploads
        self._device = device
        self._tables_bytes = 0
        self._vectors: dict[str, torch.Tensor] = {}
        self._tables: dict[str, torch.Tensor] = {}
        self._angles: dict[Rope, tuple[torch.Tensor, torch.Tensor]] = {}

    def load(self) -> DeviceModel:
        spec = self._spec
        if VECTORS in self._weights:
            bundle = self._weights[VECTORS]
            # Norms are made from them on the host: a copy, since they are small.
            flat = torch.from_numpy(np.array(bundle.arrays[VECTORS], np.float32).reshape(-1)).to(self._device)
            self._tables_bytes += flat.nbytes
            for parameter, start in vector_places(bundle.parameters):
                self._vectors[parameter.name] = flat[start : start + parameter.shape[0]]
            self._weights.release(VECTORS)
        embedding = self._linear(["embedding"], None)
        layers = tuple(self._layer(f"layers.{i}.", layer) for i, layer in enumerate(spec.layers))
        head_bias = ["head.bias"] if spec.head_bias else None
        if spec.tied_head:
            head = Linear((replace(embedding.parts[0], bias=self._bias(head_bias)),))
        else:
            head = self._linear(["head"], head_bias)
        final_norm = self._norm("final_norm", spec.final_norm)
        nbytes = self._uploads.nbytes + self._tables_bytes
        return DeviceModel(spec, embedding.parts[0], layers, final_norm, head, nbytes)

    def _layer(self, prefix: str, spec: LayerSpec) -> DeviceLayer:
        mixer, ffn = spec.mixer, spec.ffn
        assert isinstance(ffn, DenseMLP), "others are declined"
        inputs = ["gate", "up"] if ffn.gated else ["up"]
        norms = {
            name: None if norm is None else self._norm(f"{prefix}norms.{name}", norm)
            for name in ("pre_mixer", "post_mixer", "pre_ffn", "post_ffn")
            for norm in (getattr(spec.norms, name),)
        }
        qk = {
            name: None if mixer.qk_norm is None else self._norm(f"{prefix}mixer.{name}", mixer.qk_norm)
            for name in ("q_norm", "k_norm")
        }
        cosines, sines = (None, None) if mixer.rope is None else self._rotation(mixer.rope)

        def linear(block: str, names: Sequence[str], bias: bool) -> Linear:
            full = [f"{prefix}{block}.{name}" for name in names]
            return self._linear(full, [f"{name}.bias" for name in full] if bias else None)

        return DeviceLayer(
            spec=spec,
            qkv=linear("mixer", "qkv", mixer.qkv_bias),
            o=linear("mixer", "o", mixer.output_bias),
            gate_up=linear("ffn", inputs, ffn.bias),
            down=linear("ffn", ["down"], ffn.bias),
            cosines=cosines,
            sines=sines,
            **norms,
            **qk,
        )

    def _linear(self, names: Sequence[str], biases: Sequence[str] | None) -> Linear:
        """Matrices of one bundle, joined where their formats are equal."""
        bundle = self._bundle(names[0])
        by_name = {p.name: (p, f) for p, f in zip(bundle.parameters, bundle.formats, strict=True)}
        members = [by_name[f"{name}.weight"] for name in names]
        formats = [chosen for _, chosen in members]
        joined = [members] if len(set(formats)) == 1 else [[member] for member in members]
        bias = self._bias(biases)
        parts, first = [], 0
        for group in joined:
            rows = sum(parameter.shape[0] for parameter, _ in group)
            part_bias = None if bias is None else bias[first : first + rows]
            parts.append(self._matrix(bundle, group, part_bias))
            first += rows
        self._uploads.then(partial(self._weights.release, bundle.name))
        floats = [part.encoding.takes_values for part in parts]
        if any(floats) and not all(floats):
            raise IncompatibleModelError(
                f"{bundle.name} mixes matrices of floats and of integers, which the CUDA kernels cannot read together",
                remedy="Use --runner reference, or --quant int8.",
            )
        rows_of = tuple((parameter.name, parameter.shape[0]) for parameter, _ in members)
        return Linear(tuple(parts), rows_of, members[0][0].shape[1])

    def _matrix(
        self, bundle: StoredBundle, members: Sequence[tuple[Parameter, Format]], bias: torch.Tensor | None
    ) -> Matrix:
        encoding = encoding_of(members[0][1])
        assert encoding is not None, f"{members[0][1].name} was declined"
        columns = padded(members[0][0].shape[1])
        rows = sum(parameter.shape[0] for parameter, _ in members)

        def arrays(kind: str) -> list[np.ndarray]:
            return [bundle.arrays[f"{part_name(parameter)}_{kind}"] for parameter, _ in members]

        codes = self._uploads.upload(arrays("codes")).view(_PLAIN_DTYPES.get(encoding.codec, torch.int32))
        if encoding.scales == "none":
            scales = torch.empty(0, dtype=torch.float32, device=self._device)
        else:
            scales = self._uploads.upload(arrays("scales")).view(_SCALE_DTYPES[encoding.scales])
        assert codes.nbytes == rows * encoding.code_bytes(columns)
        assert scales.nbytes == rows * encoding.scale_bytes(columns)
        return Matrix(encoding, rows, columns, codes, scales, bias, self._table(members[0][1]))

    def _table(self, format: Format) -> torch.Tensor | None:
        if not isinstance(format, Codebook) or format.bits != 4:
            return None
        if format.table not in self._tables:
            self._tables[format.table] = torch.from_numpy(format.values.copy()).to(self._device)
        return self._tables[format.table]

    def _bundle(self, name: str) -> StoredBundle:
        return self._weights[bundle_name(Parameter(f"{name}.weight", (0, 0), "matrix", ""))]

    def _bias(self, names: Sequence[str] | None) -> torch.Tensor | None:
        if names is None:
            return None
        return torch.cat([self._vectors[name] for name in names])

    def _norm(self, name: str, norm: Norm) -> DeviceNorm:
        gain = self._vectors[f"{name}.weight"] + norm.offset
        bias = self._vectors[f"{name}.bias"] if norm.bias else None
        return DeviceNorm(norm.kind, norm.eps, gain, bias)

    def _rotation(self, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of every position, times the rope's attention factor; fp32 as the reference has them."""
        if rope not in self._angles:
            frequencies = torch.tensor(rope.inverse_frequencies, dtype=torch.float32)
            angles = torch.arange(self._context_tokens, dtype=torch.float32)[:, None] * frequencies
            tables = (angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor)
            made = [table.to(self._device) for table in tables]
            self._angles[rope] = (made[0], made[1])
            self._tables_bytes += made[0].nbytes + made[1].nbytes
        return self._angles[rope]
