"""The plan's memory beside what the card really gave: real shapes, two formats, two contexts.

    python benchmarks/cuda/memory.py [--models gemma-2-2b,...] [--formats int8,int4] [--contexts 2048,8192]

Weights are zeros: memory does not see the difference, and nothing has to be packed. Work reaches the plan's bounds: a
scored prompt in full chunks, then every batch size. *allocated* is the most that torch's tensors took, *card* what the
driver says this process took beside its context: torch's allocator gives nothing back meanwhile, and *beside* it grow
loaded kernels and what libraries hold. Each case is a process of its own, as a user's first load is: a later one finds
kernels and libraries loaded. Needs nvidia-ml-py, or the card to itself.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from checkpoints import config_of
from shapes import SHAPES

from octavo.backends.native import NativeBackend
from octavo.devices import choose_device, read_machine
from octavo.load_plan import LoadPlan
from octavo.models import build_model
from octavo.models.parameters import Parameter
from octavo.models.spec import ModelSpec
from octavo.packing import choose_formats
from octavo.plan import make_plan
from octavo.quant.format import Format
from octavo.runners import runner_kinds
from octavo.runners.bundles import VECTORS, padded_vector, part_name
from octavo.runners.cuda.kind import CudaRunnerKind
from octavo.runners.cuda.layout import CUDA_B64, encoding_of
from octavo.settings import Settings
from octavo.types import Request, Sampling
from octavo.weights import StoredBundle, WeightStore


@dataclass(frozen=True)
class NoTensor:
    """A TensorRef of which only the header is asked."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "bf16"

    @property
    def nbytes(self) -> int:
        return 2 * math.prod(self.shape)

    def read(self) -> np.ndarray:
        raise AssertionError("a plan reads no tensor")


def planned(name: str, quant: str, context: int) -> tuple[ModelSpec, tuple[Parameter, ...], LoadPlan]:
    config = config_of(SHAPES[name])
    spec, parameters = build_model(config, "huggingface", context_tokens=context)
    tensors = {each.source: NoTensor(each.source, each.shape) for each in parameters}
    settings = Settings(model=name, device="cuda", quant=quant, context=context)
    machine = read_machine("cuda")
    plan = make_plan(
        settings=settings,
        spec=spec,
        parameters=parameters,
        formats=choose_formats(parameters, tensors, quant),
        file_bytes={source: tensor.nbytes for source, tensor in tensors.items()},
        kinds=runner_kinds("cuda"),
        machine=machine,
        device=choose_device("cuda", machine),
    )
    return spec, parameters, plan


def zero_weights(parameters: Sequence[Parameter], plan: LoadPlan) -> WeightStore:
    """Pages of zeros that the host never fills."""

    def arrays(parameter: Parameter, format: Format) -> dict[str, np.ndarray]:
        encoding = encoding_of(format)
        assert encoding is not None
        rows, columns = parameter.shape
        made = {f"{part_name(parameter)}_codes": np.zeros(rows * encoding.code_bytes(columns), np.uint8)}
        if scale_bytes := encoding.scale_bytes(columns):
            made[f"{part_name(parameter)}_scales"] = np.zeros(rows * scale_bytes, np.uint8)
        return made

    bundles = []
    for bundle in CUDA_B64.bundles(parameters):
        formats = tuple(plan.formats[each.name] for each in bundle.parameters)
        if bundle.name == VECTORS:
            vectors = [padded_vector(np.zeros(each.shape[0], np.float32)) for each in bundle.parameters]
            stored = {VECTORS: np.concatenate(vectors)}
        else:
            stored = {}
            for parameter, chosen in zip(bundle.parameters, formats, strict=True):
                stored |= arrays(parameter, chosen)
        bundles.append(StoredBundle(bundle.name, bundle.parameters, formats, stored))
    return WeightStore(
        layout=CUDA_B64, bundles=bundles, digest="0" * 64, mapped=None, from_cache=True, notices=()
    )


def taken_bytes() -> int:
    """Of the card, by this process; without NVML by everyone."""
    try:
        import pynvml

        pynvml.nvmlInit()
        card = pynvml.nvmlDeviceGetHandleByIndex(0)
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(card):
            if process.pid == os.getpid() and process.usedGpuMemory is not None:
                return int(process.usedGpuMemory)
    except ImportError:
        pass
    free, total = torch.cuda.mem_get_info()
    return total - free


def run(backend: NativeBackend, requests: Sequence[Request]) -> None:
    open_requests = {backend.submit(request) for request in requests}
    while open_requests:
        for event in backend.step(1.0):
            if event.error is not None:
                raise event.error
            if event.finish_reason is not None:
                open_requests.discard(event.request_id)


def work(backend: NativeBackend, spec: ModelSpec, plan: LoadPlan) -> Iterator[str]:
    """What may be asked, in the order of the plan's parts; yields the name of what was done."""
    greedy, top_p = Sampling(temperature=0.0), Sampling(temperature=0.8, top_p=0.9, logprobs=5)
    draw = np.random.default_rng(0)

    def request(tokens: int, new: int, sampling: Sampling, scored: bool = False) -> Request:
        ids = tuple(map(int, draw.integers(0, spec.vocab_size, tokens)))
        return Request(ids, sampling, new, prompt_logprobs=5 if scored else None)

    tokens = plan.context.tokens
    run(backend, [request(tokens - 8, 8, greedy)])
    yield "prompt"
    run(backend, [request(tokens - 8, 8, greedy, scored=True)])
    yield "scored"
    together = 1
    while together <= plan.config.max_slots:
        for sampling in (greedy, top_p):
            run(backend, [request(max(1, tokens // together - 40), 24, sampling) for _ in range(together)])
        together *= 2
    yield "batches"


def measured(name: str, quant: str, context: int) -> str:
    torch.zeros(1, device="cuda")
    spec, parameters, plan = planned(name, quant, context)
    (pool, _) = plan.pools
    before = taken_bytes()
    runner = CudaRunnerKind().create(spec, zero_weights(parameters, plan), plan.config)
    backend = NativeBackend(runner, plan.config, spec, "0" * 64)
    phases = [f"load {torch.cuda.max_memory_allocated() >> 20}"]
    allocated = torch.cuda.max_memory_allocated()
    for phase in work(backend, spec, plan):
        torch.cuda.synchronize()
        allocated = max(allocated, torch.cuda.max_memory_allocated())
        phases.append(f"{phase} {torch.cuda.max_memory_allocated() >> 20}")
        torch.cuda.reset_peak_memory_stats()
    told = dict(backend.info()["memory"])
    card = taken_bytes() - before
    beside = card - torch.cuda.memory_reserved()
    backend.close()
    parts = " ".join(
        f"{part} {nbytes >> 20}/{told.get(part, 0) >> 20}" for part, nbytes in pool.parts.items()
    )
    need = pool.running_bytes
    return (
        f"{name:13s} {quant:8s} {context:6d} {need / 2**20:8.0f} {allocated / 2**20:9.0f} {need / allocated - 1:+7.1%} "
        f"{card / 2**20:8.0f} {need / card - 1:+7.1%} {beside >> 20:6d}  {parts}; {', '.join(phases)}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="llama-3.2-1b,gemma-2-2b,llama-3.1-8b")
    parser.add_argument("--formats", default="int8,llm-int8", help="as --quant has them")
    parser.add_argument("--contexts", default="2048,8192")
    options = parser.parse_args()
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}; MiB")
    print(
        f"{'':13s} {'format':8s} {'ctx':>6s} {'plan':>8s} {'allocated':>9s} {'':7s} {'card':>8s} {'':7s} {'beside':>6s}"
        "  planned/told; most allocated"
    )
    # What a case's process forks from has imported everything, but has not touched the card.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "octavo.backends.native", "octavo.runners.cuda.runner"])
    failed = 0
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as cases:
        for name in options.models.split(","):
            for quant in options.formats.split(","):
                for tokens in map(int, options.contexts.split(",")):
                    try:
                        print(cases.submit(measured, name, quant, tokens).result(), flush=True)
                    except Exception as error:  # the others are still worth knowing
                        failed += 1
                        print(f"{name} {quant} {tokens}: {type(error).__name__}: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
