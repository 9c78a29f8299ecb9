"""Compiles what a step and a chunk launch, for one compute capability and without a card; prints shared bytes.

    python compile_kernels.py 90 i8,int4,bf16

A process of its own: here kernels are compiled, in the tests beside it they are interpreted.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from octavo.models.spec import Attention, DenseMLP, LayerNorms, LayerSpec, ModelSpec, Norm, Rope
from octavo.runners.cuda.batch_decode import make_step
from octavo.runners.cuda.chunk import ChunkModel
from octavo.runners.cuda.decode import Card
from octavo.runners.cuda.decode_attention import Sequences
from octavo.runners.cuda.device_model import DeviceLayer, DeviceModel, DeviceNorm, Linear, Matrix
from octavo.runners.cuda.int8_linear import LARGE, int8_linear
from octavo.runners.cuda.kv_cache import make_cache
from octavo.runners.cuda.laws import SlotLaws
from octavo.runners.cuda.layout import Encoding
from octavo.runners.cuda.limits import INT8_BLOCK
from octavo.runners.cuda.low_rank import Adapters
from octavo.runners.cuda.pick import best_of_rows
from octavo.runners.cuda.prompt_rows import PromptRows
from octavo.runners.cuda.rounded import Rounded
from octavo.runners.cuda.sampling import SampleStep

HIDDEN, HEADS, KV_HEADS, DIM, FED, VOCABULARY = 256, 4, 2, 256, 512, 8192 + 5
CPU = torch.device("cpu")
ENCODINGS = {
    "i8": Encoding("i8", 64, "f16"),
    "u4": Encoding("u4", 32, "f16"),
    "int4": Encoding("u4", 32, "f9z7"),
    "i4": Encoding("i4", 128, "f16"),
    "nf4": Encoding("nf4", 64, "f32"),
    "iq4": Encoding("iq4", 32, "i8*f16"),
    "i8m": Encoding("i8m", 32, "f16"),
    "e4m3": Encoding("e4m3", 128, "f32"),
    "bf16": Encoding("bf16", 0, "none"),
}


class NoCard:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def model_of(encoding: Encoding, *, chain: bool) -> DeviceModel:
    """`chain`: nothing but rms norms before the blocks."""
    rms, layernorm = Norm("rms", 1e-6), Norm("layernorm", 1e-6, bias=True)
    rope = Rope("default", 1e4, DIM, tuple(1.0 for _ in range(DIM // 2)))
    mixer = Attention(HEADS, KV_HEADS, DIM, 0.1, rope, window=4096, softcap=50.0, qk_norm=rms)
    norms = LayerNorms(rms, None, rms, None) if chain else LayerNorms(rms, rms, layernorm, None)
    layer = LayerSpec(norms, mixer, DenseMLP(FED, "gelu_tanh"))
    spec = ModelSpec("tiny", VOCABULARY, HIDDEN, (layer,), rms, 8192, False, final_softcap=30.0)

    def matrix(rows: int, columns: int) -> Matrix:
        words = torch.zeros(rows * encoding.code_bytes(columns) // 4, dtype=torch.int32)
        codes = words.view(torch.bfloat16) if encoding.codec == "bf16" else words
        scales = torch.zeros(rows * encoding.scale_bytes(columns), dtype=torch.uint8)
        kinds = {"f16": torch.float16, "f32": torch.float32, "i8*f16": torch.int8, "f9z7": torch.int16}
        scales = scales.view(kinds.get(encoding.scales, torch.uint8))
        return Matrix(encoding, rows, columns, codes, scales, torch.zeros(rows), torch.zeros(16))

    def norm(kind: str = "rms", width: int = HIDDEN) -> DeviceNorm:
        return DeviceNorm(kind, 1e-6, torch.zeros(width), torch.zeros(width) if kind == "layernorm" else None)

    device_layer = DeviceLayer(
        spec=layer,
        qkv=Linear((matrix((HEADS + 2 * KV_HEADS) * DIM, HIDDEN),)),
        o=Linear((matrix(HIDDEN, HEADS * DIM),), (("o", HIDDEN),), HEADS * DIM),
        gate_up=Linear((matrix(2 * FED, HIDDEN),)),
        down=Linear((matrix(HIDDEN, FED),)),
        pre_mixer=norm(),
        post_mixer=None if chain else norm(),
        pre_ffn=norm("rms" if chain else "layernorm"),
        post_ffn=None,
        q_norm=norm(width=DIM),
        k_norm=norm(width=DIM),
        cosines=torch.zeros(8192, DIM // 2),
        sines=torch.zeros(8192, DIM // 2),
    )
    head = Linear((matrix(VOCABULARY, HIDDEN),))
    return DeviceModel(spec, matrix(VOCABULARY, HIDDEN), (device_layer,), norm(), head, 0)


def launch_all(encoding: Encoding, capability: int, *, chain: bool) -> None:
    model = model_of(encoding, chain=chain)
    caches, in_int8 = (make_cache(model.spec, [4], kv, CPU) for kv in (torch.bfloat16, torch.int8))
    # Few multiprocessors: enough rows for each that the gate leaves planes.
    card = Card("any", 1 if chain else 80, capability >= 90, 40 << 20)
    slots = torch.zeros(129, dtype=torch.int32)
    laws = SlotLaws.empty(128, VOCABULARY, CPU)
    adapters = Adapters(model, 129, CPU)
    for count in (1,) if chain else (1, 2, 128):
        sequences = Sequences(slots[:count], slots, (torch.zeros((129, 256), dtype=torch.int32),), 128)
        step = make_step(
            model, caches, sequences, slots, context_tokens=8192, compute_dtype=torch.bfloat16, card=card
        )
        step.forward()
        step.pick()
        if chain:
            return
        make_step(
            model, in_int8, sequences, slots, context_tokens=8192, compute_dtype=torch.bfloat16, card=card
        ).forward()
        law = SampleStep(laws, slots, slots.clone(), slots, count, multiprocessors=card.multiprocessors)
        law.launch()
        law.launch_logprobs()
    linear = model.layers[0].o
    for x in (torch.zeros((1, linear.columns)).half(), step._input_of(linear)):
        adapters.add_rows(linear, x, torch.zeros((1, linear.rows)), slots)
    rows = PromptRows(
        model,
        caches,
        (3,),
        64,
        pages=256,
        context_tokens=8192,
        compute_dtype=torch.bfloat16,
        card=card,
    )
    rows.step.forward()
    for kept in (caches, in_int8):
        chunks = ChunkModel(model, kept, torch.bfloat16)
        for tokens in (80, 8):
            chunks.forward(torch.zeros(tokens, dtype=torch.int32), 0, (slots,))
    if encoding.is_int8:
        chunks = ChunkModel(model, caches, torch.bfloat16, activations="int8", descriptors=card.pdl)
        chunks.forward(torch.zeros(80, dtype=torch.int32), 0, (slots,))
        x, codes = Rounded.empty(80, 512, INT8_BLOCK, CPU), torch.zeros((256, 512), dtype=torch.int8)
        scales, out = torch.zeros(256), torch.zeros((80, 256), dtype=torch.bfloat16)
        int8_linear(codes, scales, None, x, out, LARGE, descriptors=card.pdl)
    best_of_rows(step.logits, step.logits, slots)


def main() -> None:
    capability = int(sys.argv[1])
    driver.set_active(NoCard(capability))
    run, seen = JITFunction.run, set()

    def compile_only(kernel: Any, *arguments: Any, **options: Any) -> Any:
        compiled = run(kernel, *arguments, **(options | {"warmup": True}))
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            print(kernel.fn.__name__, compiled.metadata.shared, flush=True)
        return compiled

    JITFunction.run = compile_only
    for codec in sys.argv[2].split(","):
        launch_all(ENCODINGS[codec], capability, chain=False)
        launch_all(ENCODINGS[codec], capability, chain=True)


if __name__ == "__main__":
    main()
