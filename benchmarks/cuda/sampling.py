"""What the sampling law costs a step: graph replays of its kernels alone, each token checked against the numpy law.

    python benchmarks/cuda/sampling.py [--rows 1,8,32,128] [--vocabularies 128256,256000]

`peaked` rows have 40 tokens far above the others, as text has; `flat` ones are normal, where a top-p of 0.9 keeps
half of the vocabulary. The time of `greedy` is what any row pays that is not plainly greedy.
"""

from __future__ import annotations

import argparse

import torch

from octavo.engine import sampling as law
from octavo.runners.base import SlotState
from octavo.runners.cuda.laws import SlotLaws
from octavo.runners.cuda.pick import TOLD_STEPS
from octavo.runners.cuda.sampling import Row, SampleStep
from octavo.types import Sampling

LAWS = {
    "greedy": Sampling(temperature=0.0),
    "T": Sampling(temperature=0.8),
    "top-p": Sampling(temperature=0.8, top_p=0.9),
    "top-k": Sampling(top_k=50),
    "both": Sampling(temperature=0.7, top_k=20, top_p=0.95),
    "min-p": Sampling(min_p=0.05),
    "all": Sampling(temperature=0.8, top_p=0.95, repetition_penalty=1.1, logit_bias=((5, 1.0), (77, -2.0))),
}
CUDA = torch.device("cuda")
IDS = list(range(0, 120, 3))


def logits_of(kind: str, rows: int, vocabulary: int) -> torch.Tensor:
    generator = torch.Generator(CUDA).manual_seed(7)
    logits = torch.randn((rows, vocabulary), device=CUDA, generator=generator)
    if kind == "peaked":
        logits = logits * 2.5 - 2
        for row in logits:
            at = torch.randint(0, vocabulary, (40,), device=CUDA, generator=generator)
            row[at] = 6 + 9 * torch.rand(40, device=CUDA, generator=generator)
    return logits


def microseconds(graph: torch.cuda.CUDAGraph, replays: int = 25, rounds: int = 5) -> float:
    """Median over rounds of a replay's time."""
    found = []
    for _ in range(rounds + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(1e3 * begin.elapsed_time(end) / replays)
    return sorted(found[1:])[rounds // 2]


def measure(rows: int, vocabulary: int, kind: str) -> str:
    logits = logits_of(kind, rows, vocabulary)
    laws = SlotLaws.empty(rows, vocabulary, CUDA)
    positions = torch.zeros(rows + 1, dtype=torch.int32, device=CUDA)
    told = torch.zeros((rows + 1, TOLD_STEPS), dtype=torch.int32, pin_memory=True)
    count = torch.cuda.get_device_properties(0).multi_processor_count
    step = SampleStep(laws, torch.zeros_like(positions), positions, told, rows, multiprocessors=count)
    addresses = [row.data_ptr() for row in logits]
    step.set_rows([Row(slot, at, at, -1, -1) for slot, at in enumerate(addresses)], [])
    step.launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.launch()
    shown, wrong = [], 0
    for name, sampling in LAWS.items():
        sampled = []
        for _ in range(2):
            for slot in range(rows):
                laws.open(slot, SlotState(IDS, 20, sampling))
            positions.fill_(len(IDS) - 1)
            graph.replay()
            sampled.append(step.sampled.tolist())
        wrong += sampled[0] != sampled[1]
        for slot in range(min(rows, 3)):
            counts = law.TokenCounts.of(IDS, 20, vocabulary)
            want = law.sample_token(logits[slot].cpu().numpy(), sampling, len(IDS), counts)
            wrong += want != sampled[0][slot]
        shown.append(f"{name} {microseconds(graph):.0f}")
    return f"{', '.join(shown)} us; {wrong} wrong"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1,8,32,128")
    parser.add_argument("--vocabularies", default="128256,256000")
    arguments = parser.parse_args()
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}")
    for vocabulary in map(int, arguments.vocabularies.split(",")):
        for rows in map(int, arguments.rows.split(",")):
            for kind in ("peaked", "flat"):
                print(
                    f"V {vocabulary} rows {rows:3d} {kind:6s}: {measure(rows, vocabulary, kind)}", flush=True
                )


if __name__ == "__main__":
    main()
