"""Decode speed of the reference runner against transformers' eager fp32, same weights, interleaved.

    python benchmarks/reference_decode.py [--rounds 7] [--tokens 48] [--threads 2]

Both read one bf16 safetensors folder made from the default model, compute in fp32 and decode greedily one
token a step from the same prompt. Reported: each one's median tokens/s over the rounds with its quartiles, and
the median of the per-round ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from octavo import LLM, SamplingParams
from octavo.models import build_model
from octavo.quant.logical_layout import REF1
from octavo.sources.resolve import resolve
from octavo.weights import choose_formats, open_weights

PROMPT = list(range(1000, 1064))


def write_checkpoint(folder: Path) -> None:
    """The default model as transformers would store it in bf16."""
    source = resolve(None)
    _spec, parameters = build_model(source.config, source.naming)
    _, theirs = build_model(source.config, "huggingface")
    weights = open_weights(
        model=source.location,
        fingerprint=source.fingerprint,
        tensors=source.tensors,
        parameters=parameters,
        formats=choose_formats(parameters, source.tensors, "none"),
        layout=REF1,
        cache_dir=None,
        use_cache=False,
    )
    names = {parameter.name: parameter.source for parameter in theirs}
    tensors = {names[p.name]: torch.from_numpy(weights.unpack(p.name)).bfloat16() for p in parameters}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(source.config)))


def ours(folder: Path, tokens: int, threads: int) -> Callable[[], float]:
    llm = LLM(
        str(folder),
        quant="none",
        device="cpu",
        dtype="float32",
        runner="reference",
        context=1024,
        threads=threads,
        cache=False,
    )
    params = SamplingParams(max_new_tokens=tokens, temperature=0.0, ignore_eos=True)

    def run() -> float:
        speed = llm.generate(PROMPT, params).timings.decode_tokens_per_second
        assert speed is not None
        return speed

    return run


def peer(folder: Path, tokens: int) -> Callable[[], float]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    @torch.inference_mode()
    def run() -> float:
        out = model(torch.tensor([PROMPT]), use_cache=True)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        started = time.perf_counter()
        for _ in range(tokens - 1):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        return (tokens - 1) / (time.perf_counter() - started)

    return run


def summary(name: str, speeds: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(speeds, n=4)
    return f"{name:22} {middle:7.1f} tok/s  [{low:.1f} .. {high:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder))
        runs = {
            "octavo reference": ours(Path(folder), arguments.tokens, arguments.threads),
            "transformers eager": peer(Path(folder), arguments.tokens),
        }
        speeds: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            run()  # warm up
        for round_number in range(arguments.rounds):
            order = list(runs) if round_number % 2 else list(runs)[::-1]
            for name in order:
                speeds[name].append(runs[name]())
    for name, values in speeds.items():
        print(summary(name, values))
    ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
    print(f"ratio {statistics.median(ratios):.2f} (median of {len(ratios)} rounds)")


if __name__ == "__main__":
    main()
