"""What rounding activations costs on real weights: KL divergence from fp32 activations, on a text every CPython ships.

    python benchmarks/cuda/activations.py [MODEL] [--segments 2] [--device cpu]

Weights are the checkpoint's own numbers in fp32. The input of every linear, head included, is rounded as the CUDA
runner does for one sequence (`fixed_point.reference`), as its tensor-core kernels do (bf16), and as they might. Needs
no card: the kernels are tested against the same references.
"""

from __future__ import annotations

import argparse
import os
import pydoc_data.topics
from collections.abc import Callable

import torch
import torch.nn.functional as F

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from reference import logits_of

from octavo.loading import plan_model
from octavo.packing import choose_formats
from octavo.runners.cuda import fixed_point
from octavo.runners.cuda.device_model import DeviceModel, load_model
from octavo.runners.cuda.layout import CUDA_B64
from octavo.settings import Settings
from octavo.text.tokenizer import load_tokenizer
from octavo.weights import open_weights

SEGMENT_TOKENS = 512


def fixed(x: torch.Tensor) -> torch.Tensor:
    """The runner's: 16 bits, a scale for each 32 columns."""
    return fixed_point.dequantize(fixed_point.reference(x, 32))


def steps(x: torch.Tensor, most: int, block: int) -> torch.Tensor:
    """Integers up to `most`, a scale for each `block` columns; 0: for the whole row."""
    columns = x.shape[-1]
    blocks = F.pad(x, (0, -columns % block)).unflatten(-1, (-1, block)) if block else x[..., None, :]
    scale = (blocks.abs().amax(-1, keepdim=True) / most).clamp_min(1e-30)
    return ((blocks / scale).round() * scale).flatten(-2)[..., :columns]


def without_outliers(x: torch.Tensor) -> torch.Tensor:
    """LLM.int8: columns in which any token is above 6 stay in 16 bits, the others are int8 with a scale a row."""
    outlier = (x.abs() > 6.0).any(0)
    return torch.where(outlier, x.half().float(), steps(x.masked_fill(outlier, 0.0), 127, 0))


def fp8(x: torch.Tensor) -> torch.Tensor:
    """e4m3 with a scale a row, as servers with fp8 activations have it."""
    scale = (x.abs().amax(-1, keepdim=True) / 448).clamp_min(1e-30)
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


ROUNDINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bf16": lambda x: x.bfloat16().float(),
    "fp16": lambda x: x.half().float(),
    "16-bit fixed point, a scale a 32 columns": fixed,
    "16-bit fixed point, a scale a 64 columns": lambda x: steps(x, 32512, 64),
    "16-bit fixed point, a scale a row": lambda x: steps(x, 32512, 0),
    "int8, a scale a 64 columns": lambda x: steps(x, 127, 64),
    "int8, a scale a 128 columns": lambda x: steps(x, 127, 128),
    "int8, a scale a 256 columns": lambda x: steps(x, 127, 256),
    "int8, a scale a row": lambda x: steps(x, 127, 0),
    "fp8 (e4m3), a scale a row": fp8,
    "LLM.int8: a scale a row, columns above 6 in fp16": without_outliers,
}


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL of each row of log-probabilities. In fp64: the differences are far below fp32's steps of a logarithm."""
    p, q = p.double(), q.double()
    return (p.exp() * (p - q)).sum(-1)


def load(name: str | None, device: torch.device, segments: int) -> tuple[DeviceModel, list[torch.Tensor]]:
    planned = plan_model(Settings(model=name or "default", device="cpu", quant="none"))
    source, parameters = planned.source, planned.parameters
    weights = open_weights(
        model="activations",
        fingerprint=source.fingerprint,
        tensors=source.tensors,
        parameters=parameters,
        formats=choose_formats(parameters, source.tensors, "none"),
        layout=CUDA_B64,
        cache_dir=None,
        use_cache=False,
    )
    model = load_model(planned.spec, weights, SEGMENT_TOKENS, device)
    text = "\n\n".join(pydoc_data.topics.topics.values())
    ids = load_tokenizer(source.tokenizer).encode(text[: 8 * SEGMENT_TOKENS * segments], parse_special=False)
    pieces = torch.tensor(ids[: SEGMENT_TOKENS * segments], device=device).split(SEGMENT_TOKENS)
    return model, list(pieces)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--segments", type=int, default=2, help=f"of {SEGMENT_TOKENS} tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    model, segments = load(options.model, torch.device(options.device), options.segments)
    exact = [logits_of(model, ids, len(ids)).log_softmax(-1) for ids in segments]
    tokens = sum(map(len, segments))
    surprise = [-p[:-1].gather(1, ids[1:, None]) for p, ids in zip(exact, segments, strict=True)]
    perplexity = float(torch.cat(surprise).mean().exp())
    print(f"{tokens} tokens, perplexity {perplexity:.2f}, torch {torch.__version__} on {options.device}")
    print(f"{'activations':48s} {'mean KL':>10s} {'99th pct':>10s} {'largest':>10s} {'same top':>9s}")
    for name, rounded in ROUNDINGS.items():
        divergences, same = [], 0
        for ids, want in zip(segments, exact, strict=True):
            got = logits_of(model, ids, len(ids), rounded).log_softmax(-1)
            divergences += [divergence(*pair) for pair in zip(want.split(64), got.split(64), strict=True)]
            same += int((want.argmax(-1) == got.argmax(-1)).sum())
        every = torch.cat(divergences)
        print(
            f"{name:48s} {every.mean():10.2e} {every.quantile(0.99):10.2e} {every.max():10.2e} {same / tokens:9.2%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
