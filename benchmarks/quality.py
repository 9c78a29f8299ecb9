"""What quantizing costs: KL divergence and top-1 agreement to full precision on a text every CPython ships.

    python benchmarks/quality.py [MODEL] [--tokens 4096] [--rescale SEED [--inside]] [--formats int8,int4]
                                 [--ggml LIB] [--against q4_k] [--kv-dtypes bfloat16,int8] [--json]

Full precision is the checkpoint's own numbers in fp32; for a GGUF that is the dequantized file. Every format
runs in the reference runner's model in fp32, so what is measured is the weights alone. --rescale multiplies each
norm before attention and MLP by factors between 0.7 and 1.4, and divides the columns it feeds by them: the same
function, on no grid that an earlier quantization left. --inside does the same to rows of v and up and the columns
of o and down that these feed: without it the weights of o and down stay on an earlier grid. --ggml names llama.cpp's
libggml-base, whose own quantizer then makes q4_k, q4_1 and q4_0 of the layers' matrices, flattened where rows are no
multiple of its blocks; embedding and head are int8 beside them, as beside int4 and nf4. --against names one of the
formats, and adds by how much each other's KL is larger, taken token by token: what is easy to predict is so for both,
so this difference is known far better than either KL. --kv-dtypes measures keys and values kept in these types
instead, with weights in full.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import pydoc_data.topics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from octavo.evaluate.divergence import Divergence, divergences
from octavo.evaluate.logits import SegmentLogits
from octavo.models import build_model
from octavo.models.parameters import Parameter
from octavo.models.spec import KV_PAGE_TOKENS, Attention, DenseMLP, ModelSpec
from octavo.packing import pack_parameter
from octavo.quant.affine import INT8
from octavo.quant.checkpoint import open_quantized
from octavo.quant.format import Format
from octavo.quant.ggml_blocks import BLOCK_TYPES
from octavo.quant.logical_layout import REF1
from octavo.quant.plain import Plain
from octavo.runners.reference.kv_cache import KVCache, Rows
from octavo.sources.ggml_types import GGML_TYPES
from octavo.sources.resolve import resolve
from octavo.text.tokenizer import load_tokenizer
from octavo.types import ModelSource, TensorRef
from octavo.weights import choose_formats, open_weights

SEGMENT_TOKENS = 512
FORMATS = ("auto", "int8", "llm-int8", "int4", "nf4")
GGML_FORMATS = ("q4_k", "q4_1", "q4_0")
_FED_BY = {
    "norms.pre_mixer.weight": ("mixer.q.weight", "mixer.k.weight", "mixer.v.weight"),
    "norms.pre_ffn.weight": ("ffn.gate.weight", "ffn.up.weight"),
}


@dataclass(frozen=True, slots=True)
class Measured:
    divergence: Divergence
    packed_bytes: int
    bits_a_weight: float
    """Of the layers' matrices."""


@dataclass(frozen=True, slots=True)
class InMemory:
    """A TensorRef of float32 values."""

    name: str
    values: np.ndarray = field(repr=False)

    @property
    def dtype(self) -> str:
        return "f32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def read(self) -> np.ndarray:
        return self.values


@dataclass(frozen=True, slots=True)
class Model:
    spec: ModelSpec
    parameters: Sequence[Parameter]
    tensors: Mapping[str, TensorRef]

    def logits(self, formats: Mapping[str, Format]) -> SegmentLogits:
        weights = open_weights(
            model="measured",
            fingerprint="",
            tensors=self.tensors,
            parameters=self.parameters,
            formats=formats,
            layout=REF1,
            cache_dir=None,
            use_cache=False,
        )
        return SegmentLogits(self.spec, weights, SEGMENT_TOKENS)

    def matrices(self) -> Iterator[Parameter]:
        """Those of the layers."""
        return (p for p in self.parameters if p.role == "matrix" and p.name.startswith("layers."))

    def size(self, formats: Mapping[str, Format]) -> tuple[int, float]:
        """Packed bytes, and bits a weight of the layers' matrices."""

        def nbytes(parameter: Parameter) -> int:
            rows, columns = parameter.shape if len(parameter.shape) == 2 else (1, parameter.shape[0])
            return formats[parameter.name].nbytes(rows, columns)

        weights = sum(p.shape[0] * p.shape[1] for p in self.matrices())
        bits = 8 * sum(map(nbytes, self.matrices())) / weights
        return sum(map(nbytes, self.parameters)), bits


def segments(source: ModelSource, tokens: int) -> list[list[int]]:
    """The first `tokens` tokens of pydoc_data.topics, cut into segments without overlap."""
    assert source.tokenizer is not None, "the model has no tokenizer"
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = load_tokenizer(source.tokenizer).encode(text[: 8 * tokens], parse_special=False)[:tokens]
    return [ids[i : i + SEGMENT_TOKENS] for i in range(0, len(ids), SEGMENT_TOKENS)]


def rescaled(model: Model, seed: int, inside: bool = False) -> Model:
    """The same function by other weights: factors log-uniform in 0.7..1.4 from norms to the columns they feed, and
    `inside` from rows of v and up to the columns of o and down."""
    random = np.random.default_rng(seed)

    def factors(size: int) -> np.ndarray:
        return np.exp(random.uniform(np.log(0.7), np.log(1.4), size)).astype(np.float32)

    values = {
        p.name: pack_parameter(p, model.tensors, Plain("f32"))["values"].copy() for p in model.parameters
    }
    for index, layer in enumerate(model.spec.layers):
        for norm, fed in _FED_BY.items():
            spec = getattr(layer.norms, norm.split(".")[1])
            gain = values.get(f"layers.{index}.{norm}")
            if gain is None or spec.bias:
                continue
            by = factors(len(gain))
            gain[...] = (gain + spec.offset) * by - spec.offset
            for name in fed:
                if f"layers.{index}.{name}" in values:
                    values[f"layers.{index}.{name}"] /= by
        if inside:
            mixer, ffn = layer.mixer, layer.ffn
            assert isinstance(mixer, Attention), "--inside rescales nothing else"
            assert isinstance(ffn, DenseMLP), "--inside rescales no experts"
            assert not mixer.qkv_bias, "--inside rescales no biases"
            assert ffn.gated, "--inside rescales gated MLPs"
            assert not ffn.bias, "--inside rescales no biases"
            by = factors(mixer.kv_heads * mixer.head_dim)
            values[f"layers.{index}.mixer.v.weight"] *= by[:, None]
            heads = by.reshape(mixer.kv_heads, 1, -1).repeat(mixer.heads // mixer.kv_heads, axis=1)
            values[f"layers.{index}.mixer.o.weight"] /= heads.reshape(-1)
            by = factors(ffn.hidden_size)
            values[f"layers.{index}.ffn.up.weight"] *= by[:, None]
            values[f"layers.{index}.ffn.down.weight"] /= by
    parameters = [Parameter(p.name, p.shape, p.role, p.name) for p in model.parameters]
    return Model(model.spec, parameters, {name: InMemory(name, array) for name, array in values.items()})


def by_ggml(model: Model, library: str, kind: str) -> tuple[Model, Mapping[str, Format], float]:
    """The model with its layers' matrices quantized by ggml; the formats of the rest; bits a weight."""
    (number,) = (number for number, found in GGML_TYPES.items() if found.name == kind)
    block, nbytes = BLOCK_TYPES[kind].columns, BLOCK_TYPES[kind].nbytes
    quantize = ctypes.CDLL(library).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    tensors: dict[str, TensorRef] = {}
    matrices = {parameter.name for parameter in model.matrices()}
    for parameter in model.parameters:
        values = pack_parameter(parameter, model.tensors, Plain("f32"))["values"]
        if parameter.name in matrices:
            rows, columns = parameter.shape
            width = columns if columns % block == 0 else block
            flat = np.ascontiguousarray(values).reshape(-1, width)
            raw = np.empty((len(flat), width // block * nbytes), np.uint8)
            quantize(number, flat.ctypes.data, raw.ctypes.data, 0, len(flat), width, None)
            packed = BLOCK_TYPES[kind].split(raw, width)
            values = BLOCK_TYPES[kind].format.unpack(packed, width).reshape(rows, columns)
        tensors[parameter.name] = InMemory(parameter.name, values)
    parameters = [Parameter(p.name, p.shape, p.role, p.name) for p in model.parameters]
    formats: dict[str, Format] = {
        p.name: Plain("f32") if p.role == "vector" or p.name in matrices else INT8 for p in parameters
    }
    return Model(model.spec, parameters, tensors), formats, 8 * nbytes / block


def measure(
    location: str | None,
    tokens: int,
    formats: Sequence[str] = FORMATS,
    seed: int | None = None,
    inside: bool = False,
    library: str | None = None,
) -> dict[str, Measured]:
    """Format -> what it costs; one format's weights are in memory at a time."""
    source = open_quantized(resolve(location))
    spec, parameters = build_model(source.config, source.naming)
    model = Model(spec, parameters, source.tensors)
    if seed is not None:
        model = rescaled(model, seed, inside)
    text = segments(source, tokens)
    truth = model.logits(choose_formats(model.parameters, model.tensors, "none"))
    found: dict[str, Measured] = {}
    for quant in formats:
        if quant in GGML_FORMATS:
            assert library is not None, f"{quant} needs --ggml"
            other, chosen, bits = by_ggml(model, library, quant)
            weights = sum(p.shape[0] * p.shape[1] for p in model.matrices())
            nbytes = other.size(chosen)[0] - 4 * weights + round(bits * weights / 8)
        else:
            other, chosen = model, choose_formats(model.parameters, model.tensors, quant)
            nbytes, bits = model.size(chosen)
        divergence = divergences(truth, {quant: other.logits(chosen)}, text)[quant]
        found[quant] = Measured(divergence, nbytes, bits)
    return found


class RoundedCache(KVCache):
    """fp32 pages of what another type would have kept."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        pages = [-(-SEGMENT_TOKENS // KV_PAGE_TOKENS)] * len(spec.kv_groups)
        super().__init__(spec, pages, torch.float32, torch.device("cpu"))
        self._dtype = dtype

    def write(self, layer: int, rows: Rows, k: torch.Tensor, v: torch.Tensor) -> None:
        super().write(layer, rows, self._rounded(k), self._rounded(v))

    def _rounded(self, values: torch.Tensor) -> torch.Tensor:
        if self._dtype != torch.int8:
            return values.to(self._dtype).float()
        scales = values.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        return (values / scales).round() * scales


def measure_kv(location: str | None, tokens: int, dtypes: Sequence[str]) -> dict[str, Divergence]:
    """Type of keys and values -> what it costs."""
    source = open_quantized(resolve(location))
    spec, parameters = build_model(source.config, source.naming)
    model = Model(spec, parameters, source.tensors)
    full = choose_formats(parameters, source.tensors, "none")
    others = {}
    for name in dtypes:
        others[name] = model.logits(full)
        others[name]._cache = RoundedCache(spec, getattr(torch, name))
    return divergences(model.logits(full), others, segments(source, tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="default: the default model")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rescale", type=int, metavar="SEED")
    parser.add_argument("--inside", action="store_true", help="with --rescale: v to o and up to down too")
    parser.add_argument("--formats", help=f"separated by commas [default: {','.join(FORMATS)}]")
    parser.add_argument(
        "--ggml", metavar="LIB", help="libggml-base of a build of llama.cpp: adds its formats"
    )
    parser.add_argument("--kv-dtypes", help="separated by commas: measure these, and no formats")
    parser.add_argument("--against", metavar="FORMAT", help="compare the others with this one token by token")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.kv_dtypes:
        kept = measure_kv(arguments.model, arguments.tokens, arguments.kv_dtypes.split(","))
        if arguments.json:
            print(json.dumps({name: asdict(d) for name, d in kept.items()}))
            return
        for name, d in kept.items():
            print(
                f"{name:10} {d.kl_nats:9.2e} +- {d.standard_error:.1e} nats/token, top-1 {d.top1_agreement:.3f}"
            )
        return
    formats = (*FORMATS, *(GGML_FORMATS if arguments.ggml else ()))
    if arguments.formats:
        formats = tuple(arguments.formats.split(","))
    if arguments.inside and arguments.rescale is None:
        parser.error("--inside needs --rescale")
    if arguments.against not in (None, *formats):
        parser.error(f"--against {arguments.against} is not one of the formats")
    found = measure(
        arguments.model, arguments.tokens, formats, arguments.rescale, arguments.inside, arguments.ggml
    )
    if arguments.json:
        print(json.dumps({name: _facts(found, name, arguments.against) for name in found}))
        return
    print(f"{'format':10} {'packed MB':>10} {'bits':>6} {'KL nats/token':>14} {'+- s.e.':>9} {'top-1':>7}")
    for name, measured in found.items():
        d = measured.divergence
        print(
            f"{name:10} {measured.packed_bytes / 1e6:10.1f} {measured.bits_a_weight:6.3f} {d.kl_nats:14.2e} "
            f"{d.standard_error:9.1e} {d.top1_agreement:7.3f}"
        )
    if arguments.against is not None:
        other = found.pop(arguments.against).divergence
        for name, measured in found.items():
            beyond = measured.divergence.kl_beyond(other)
            print(f"{name} - {arguments.against}: {beyond.mean:+.2e} +- {beyond.standard_error or 0:.1e}")


def _facts(found: Mapping[str, Measured], name: str, against: str | None) -> dict[str, Any]:
    facts = asdict(found[name])
    del facts["divergence"]["token_kls"]
    if against is not None:
        facts["kl_beyond"] = asdict(found[name].divergence.kl_beyond(found[against].divergence))
    return facts


if __name__ == "__main__":
    main()
