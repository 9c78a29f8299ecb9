"""What quantizing costs: KL divergence and top-1 agreement to full precision on a text every CPython ships.

    python benchmarks/quality.py [MODEL] [--tokens 4096] [--json]

Full precision is the checkpoint's own numbers in fp32; for a GGUF that is the dequantized file. Every format
runs in the reference runner's model in fp32, so what is measured is the weights alone.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
from dataclasses import asdict

from octavo.evaluate.divergence import Divergence, divergences
from octavo.evaluate.logits import SegmentLogits
from octavo.models import build_model
from octavo.quant.logical_layout import REF1
from octavo.sources.resolve import resolve
from octavo.text.tokenizer import load_tokenizer
from octavo.types import ModelSource
from octavo.weights import choose_formats, open_weights

SEGMENT_TOKENS = 512
FORMATS = ("auto", "int8", "llm-int8")


def segments(source: ModelSource, tokens: int) -> list[list[int]]:
    """The first `tokens` tokens of pydoc_data.topics, cut into segments without overlap."""
    assert source.tokenizer is not None, "the model has no tokenizer"
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = load_tokenizer(source.tokenizer).encode(text[: 8 * tokens], parse_special=False)[:tokens]
    return [ids[i : i + SEGMENT_TOKENS] for i in range(0, len(ids), SEGMENT_TOKENS)]


def logits_in(source: ModelSource, quant: str) -> tuple[SegmentLogits, int]:
    """The model with its weights in a format, and the packed bytes."""
    spec, parameters = build_model(source.config, source.naming)
    weights = open_weights(
        model=source.location,
        fingerprint=source.fingerprint,
        tensors=source.tensors,
        parameters=parameters,
        formats=choose_formats(parameters, source.tensors, quant),
        layout=REF1,
        cache_dir=None,
        use_cache=False,
    )
    return SegmentLogits(spec, weights, SEGMENT_TOKENS), weights.nbytes


def measure(model: str | None, tokens: int) -> dict[str, tuple[Divergence, int]]:
    """Format -> (divergence from full precision, packed bytes)."""
    source = resolve(model)
    text = segments(source, tokens)
    truth, _ = logits_in(source, "none")
    models = {quant: logits_in(source, quant) for quant in FORMATS}
    found = divergences(truth, {quant: model for quant, (model, _) in models.items()}, text)
    return {quant: (found[quant], nbytes) for quant, (_, nbytes) in models.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="default: the default model")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measure(arguments.model, arguments.tokens)
    if arguments.json:
        print(json.dumps({name: {**asdict(d), "packed_bytes": n} for name, (d, n) in found.items()}))
        return
    print(f"{'format':10} {'packed MB':>10} {'KL nats/token':>14} {'+- s.e.':>9} {'top-1':>7}")
    for name, (d, nbytes) in found.items():
        print(
            f"{name:10} {nbytes / 1e6:10.1f} {d.kl_nats:14.2e} {d.standard_error:9.1e} {d.top1_agreement:7.3f}"
        )


if __name__ == "__main__":
    main()
