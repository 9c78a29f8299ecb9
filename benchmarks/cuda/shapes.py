"""Random models of real shapes, made on the card in layout `cuda-b64-1`: for speed, and for the error of a step.

Weights are normal, never zeros: zeros run faster. The embedding is separate from the head, so that the model
does not repeat its input. Shape letters: N output rows, C padded columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from octavo.models.spec import Attention, DenseMLP, LayerNorms, LayerSpec, ModelSpec, Norm, Rope
from octavo.runners.cuda.device_model import DeviceLayer, DeviceModel, DeviceNorm, Linear, Matrix
from octavo.runners.cuda.layout import Encoding

_INT8 = Encoding("i8", 64, "f16")
FORMATS = {
    name: (layers, layers if name not in ("int4", "int4-g128") else _INT8)
    for name, layers in {
        "int8": _INT8,
        "llm-int8": Encoding("i8", 0, "f32"),
        "q8_0": Encoding("i8", 32, "f16"),
        "q4_1": Encoding("u4", 32, "f16"),
        "int4": Encoding("u4", 32, "f9z7"),
        "int4-g128": Encoding("i4", 128, "f16"),
        "bf16": Encoding("bf16", 0, "none"),
    }.items()
}
"""Of the layers' matrices; of the embedding and the head."""


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    fed: int
    vocabulary: int
    gemma: bool
    rope_base: float
    tied: bool
    """Of checkpoints; models made on the card have a head of their own, so that they do not repeat their input."""


SHAPES = {
    "gemma-2-2b": Shape(26, 2304, 8, 4, 256, 9216, 256000, True, 10000.0, True),
    "llama-3.1-8b": Shape(32, 4096, 32, 8, 128, 14336, 128256, False, 500000.0, False),
    "llama-3.2-1b": Shape(16, 2048, 32, 8, 64, 8192, 128256, False, 500000.0, True),
}


def spec_of(shape: Shape) -> ModelSpec:
    half = shape.head_dim // 2
    rope = Rope(
        "default",
        shape.rope_base,
        shape.head_dim,
        tuple(float(shape.rope_base ** (-i / half)) for i in range(half)),
    )
    rms = Norm("rms", 1e-6)
    post = rms if shape.gemma else None

    def layer(index: int) -> LayerSpec:
        mixer = Attention(
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            scale=shape.head_dim**-0.5,
            rope=rope,
            window=4096 if shape.gemma and index % 2 == 0 else None,
            softcap=50.0 if shape.gemma else None,
        )
        return LayerSpec(
            LayerNorms(rms, post, rms, post),
            mixer,
            DenseMLP(shape.fed, "gelu_tanh" if shape.gemma else "silu"),
        )

    return ModelSpec(
        family="random",
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        layers=tuple(map(layer, range(shape.layers))),
        final_norm=rms,
        max_context_tokens=8192,
        tied_head=False,
        final_softcap=30.0 if shape.gemma else None,
    )


def random_matrix(rows: int, columns: int, encoding: Encoding) -> Matrix:
    """Weights of standard deviation about columns^-0.5."""
    empty = torch.empty(0, device="cuda")
    spread = columns**-0.5
    if encoding.codec == "bf16":
        codes = torch.empty((rows, columns), dtype=torch.bfloat16, device="cuda")
        for part in codes.split(16384):
            part.copy_(torch.randn(part.shape, device="cuda") * spread)
        return Matrix(encoding, rows, columns, codes.view(-1), empty, None)
    groups = encoding.groups(columns)
    jitter = 0.8 + 0.4 * torch.rand((rows, groups), device="cuda")
    if encoding.codec in ("u4", "i4"):
        codes = torch.randint(-(2**31), 2**31 - 1, (rows * columns // 8,), dtype=torch.int32, device="cuda")
        scale = (jitter * spread / 4.6).half()
        if encoding.codec == "i4":  # -7..7: with -8 their mean is not 0, and one number drowns all others
            low, high = torch.randint(-7, 8, (2, rows * columns // 2), dtype=torch.int8, device="cuda")
            codes = (low & 15 | high << 4).view(torch.int32)
            return Matrix(encoding, rows, columns, codes, scale.view(-1), None)
        if encoding.scales == "f9z7":  # 2^(e - 22) (1 + m / 16), and a zero of 60 eighths of a code
            exponent = scale.float().log2().floor()
            mantissa = (scale.float() / exponent.exp2() * 16 - 16).floor()
            words = ((exponent + 22) * 16 + mantissa).to(torch.int16) | (60 << 9)
            return Matrix(encoding, rows, columns, codes, words.view(-1), None)
        pairs = torch.stack((scale, (-7.5 * scale.float()).half()), -1)
        return Matrix(encoding, rows, columns, codes, pairs.view(-1).view(torch.int32), None)
    codes = torch.empty((rows, columns), dtype=torch.int8, device="cuda")
    for part in codes.split(16384):
        part.copy_((torch.randn(part.shape, device="cuda") * 28).round_().clamp_(-127, 127))
    scales = jitter * spread / 28
    dtype = torch.float32 if encoding.scales == "f32" else torch.float16
    return Matrix(encoding, rows, columns, codes.view(-1).view(torch.int32), scales.to(dtype).view(-1), None)


def random_model(
    shape: Shape, formats: tuple[Encoding, Encoding], context_tokens: int, seed: int = 0
) -> DeviceModel:
    torch.manual_seed(seed)
    spec = spec_of(shape)
    frequencies = torch.tensor(spec.layers[0].mixer.rope.inverse_frequencies)  # type: ignore[union-attr]
    angles = torch.arange(context_tokens)[:, None] * frequencies
    cosines, sines = angles.cos().cuda(), angles.sin().cuda()

    def norm(mean: float = 1.0) -> DeviceNorm:
        return DeviceNorm("rms", 1e-6, mean + 0.1 * torch.randn(shape.hidden, device="cuda"), None)

    def linear(rows: int, columns: int) -> Linear:
        return Linear((random_matrix(rows, columns, formats[0]),))

    mixed = shape.heads * shape.head_dim
    layers = tuple(
        DeviceLayer(
            spec=layer,
            qkv=linear(mixed + 2 * shape.kv_heads * shape.head_dim, shape.hidden),
            o=linear(shape.hidden, mixed),
            gate_up=linear(2 * shape.fed, shape.hidden),
            down=linear(shape.hidden, shape.fed),
            pre_mixer=norm(),
            post_mixer=norm(0.5) if shape.gemma else None,
            pre_ffn=norm(),
            post_ffn=norm(0.5) if shape.gemma else None,
            q_norm=None,
            k_norm=None,
            cosines=cosines,
            sines=sines,
        )
        for layer in spec.layers
    )
    embedding = random_matrix(shape.vocabulary, shape.hidden, formats[1])
    head = Linear((random_matrix(shape.vocabulary, shape.hidden, formats[1]),))
    return DeviceModel(spec, embedding, layers, norm(), head, 0)


def read_bytes(model: DeviceModel) -> int:
    """Weights that a decode step has to read: everything but the embedding."""
    linears = [
        model.head,
        *(x for layer in model.layers for x in (layer.qkv, layer.o, layer.gate_up, layer.down)),
    ]
    return sum(part.codes.nbytes + part.scales.nbytes for linear in linears for part in linear.parts)


def stream_bytes_per_second() -> float:
    """What a sum over 2 GB reads a second: the best of ten, the roof of every figure."""
    data = torch.randn(1 << 29, device="cuda").view(-1)
    best = math.inf
    for _ in range(10):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        data.sum()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end))
    return data.nbytes / best * 1e3
