"""Decode of one sequence in every format the CPU kernels read: what share of the read bandwidth its bytes take.

    python benchmarks/cpu/formats.py [MODEL] [--formats q4_k nf4] [--threads 1 2] [--rounds 5]

Weights of the model's shape, every matrix in the format, all bytes alike: what they are does not change the time.
The bandwidth is measured beside every measurement of a format, and the share taken of that.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import numpy as np
from decode import Loaded, decode

from octavo.models import build_model
from octavo.models.parameters import Parameter
from octavo.models.spec import ModelSpec
from octavo.quant import affine, codebook
from octavo.quant.affine import Affine
from octavo.quant.codebook import Codebook
from octavo.quant.format import Bundle, Format
from octavo.quant.plain import Plain
from octavo.runners.bundles import VECTORS, padded_vector, part_name
from octavo.runners.cpu.huge_pages import copied, is_offered
from octavo.runners.cpu.kind import CpuRunnerKind
from octavo.runners.cpu.layout import CpuLayout, alternate, encoding_of
from octavo.runners.cpu.library import read_bandwidth
from octavo.sources.resolve import resolve
from octavo.weights import StoredBundle, WeightStore

FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        *(affine.INT8, affine.LLM_INT8, affine.Q8_0, affine.Q5_1, affine.Q5_K, affine.Q6_K),
        *(affine.INT4, affine.Q4_0, affine.Q4_1, affine.Q2_K, affine.Q3_K, affine.Q4_K),
        Affine("gptq, groups of 128", 4, 128, "integer", "f16", "step", None),
        *(codebook.NF4, codebook.IQ4_NL, codebook.IQ4_XS),
        Codebook("fp8, a scale a row", "e4m3", None, "f32", None),
        Codebook("fp8, groups of 128", "e4m3", 128, "f32", None),
        *(Plain("bf16"), Plain("f16"), Plain("f32")),
    )
}
_FILL = 0x3D
"""A number of moderate size as a byte of every kind of float there is here."""


def filled(bundle: Bundle, chosen: Format, lanes: int) -> StoredBundle:
    formats = tuple(Plain("f32") if each.role == "vector" else chosen for each in bundle.parameters)
    if bundle.name == VECTORS:
        vectors = [padded_vector(np.ones(each.shape[0], np.float32)) for each in bundle.parameters]
        return StoredBundle(bundle.name, bundle.parameters, formats, {VECTORS: np.concatenate(vectors)})
    arrays = {part_name(each): filled_blocks(each, chosen, lanes) for each in bundle.parameters}
    if alternate(bundle.parameters, formats):
        arrays = {"gate_up": np.concatenate([arrays["gate"], arrays["up"]])}
    return StoredBundle(bundle.name, bundle.parameters, formats, arrays)


def filled_blocks(parameter: Parameter, chosen: Format, lanes: int) -> np.ndarray:
    rows, columns = parameter.shape
    encoding = encoding_of(chosen, columns, lanes)
    assert encoding is not None
    return np.full((-(-rows // lanes), encoding.block_bytes), _FILL, np.uint8)


def loaded(spec: ModelSpec, parameters: Sequence[Parameter], chosen: Format) -> Loaded:
    kind = CpuRunnerKind()
    layout = kind.layout
    assert isinstance(layout, CpuLayout)
    bundles: Sequence[StoredBundle] = [
        filled(bundle, chosen, layout.lanes) for bundle in layout.bundles(parameters)
    ]
    weights = _store(layout, bundles)
    if is_offered():  # as the runner copies what it maps
        weights = _store(layout, list(copied(weights).values()))
    return Loaded(spec, weights, kind)


def _store(layout: CpuLayout, bundles: Sequence[StoredBundle]) -> WeightStore:
    return WeightStore(layout=layout, bundles=bundles, digest="", mapped=None, from_cache=False, notices=())


def measure(model: Loaded, threads: int, rounds: int) -> list[tuple[float, float]]:
    """Tokens and bytes read a second, of each round."""
    runner = model.runner(threads)
    decode(model, runner, 1, 1)
    found = [(decode(model, runner, 1, 1), read_bandwidth(threads)) for _ in range(rounds)]
    runner.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="default: the default model")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    source = resolve(arguments.model)
    spec, parameters = build_model(source.config, source.naming)
    print(f"{'format':22} {'MB a token':>10} {'threads':>7} {'tokens/s':>9}  share of the read bandwidth")
    for name in arguments.formats:
        model = loaded(spec, parameters, FORMATS[name])
        for threads in arguments.threads:
            measured = measure(model, threads, arguments.rounds)
            share = [speed * model.token_bytes / bandwidth for speed, bandwidth in measured]
            print(
                f"{name:22} {model.token_bytes / 1e6:10.1f} {threads:7} "
                f"{statistics.median(speed for speed, _ in measured):9.1f}  "
                f"{statistics.median(share):.2f} ({min(share):.2f} .. {max(share):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
