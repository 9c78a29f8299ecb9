"""Prefill speed of random models of real shapes: thousand tokens/s of one chunk, eager.

python benchmarks/cuda/prefill.py [--models gemma-2-2b,...] [--format int8] [--tokens 2048] [--activations int8]
"""

from __future__ import annotations

import argparse

import torch
from reference import logits_of
from shapes import FORMATS, SHAPES, random_model

from octavo.runners.cuda.chunk import ChunkModel
from octavo.runners.cuda.kv_cache import make_cache


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--format", default="int8")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--activations", choices=("int16", "int8"), default="int16")
    arguments = parser.parse_args()
    tokens = arguments.tokens
    descriptors = torch.cuda.get_device_capability() >= (9, 0)
    for name in arguments.models.split(","):
        model = random_model(SHAPES[name], FORMATS[arguments.format], 8192)
        pages = -(-tokens // 32)
        groups = len(model.spec.kv_groups)
        caches = make_cache(model.spec, [pages] * groups, torch.bfloat16, torch.device("cuda"))
        table = torch.randperm(pages, device="cuda").to(torch.int32)
        chunks = ChunkModel(
            model, caches, torch.bfloat16, activations=arguments.activations, descriptors=descriptors
        )
        ids = torch.randint(model.spec.vocab_size, (tokens,), device="cuda").to(torch.int32)
        times = []
        for _ in range(6):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            hidden = chunks.forward(ids, 0, (table,) * groups)
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        ms = sorted(times[1:])[2]
        got = torch.empty((16, model.spec.vocab_size), device="cuda")
        chunks.forward(ids[:256], 0, (table,) * groups)
        chunks.logits(chunks.forward(ids[:256], 0, (table,) * groups)[-16:], got)
        want = logits_of(model, ids[:256].long(), 16)
        error = float((got - want).norm() / want.norm())
        print(
            f"{name:13s} prefill {tokens}: {tokens / ms:6.1f} thousand tok/s, {ms:.2f} ms; error {error:.4f}",
            flush=True,
        )
        del model, caches, chunks, hidden, want
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
