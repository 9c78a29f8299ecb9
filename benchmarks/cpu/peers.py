"""Octavo against each of several peers, through `LLM.generate` as a user has it, for several numbers of sequences.

    python benchmarks/cpu/peers.py [MODEL] [--quant int8] [--sequences 1 8 32] [--threads 2]
        --peer transformers=bf16 --peer transformers=int8 --peer llama.cpp=LLAMA-BENCH [--peer-model Q8_0.gguf]

What `octavo bench --peer` does, once for each peer and number of sequences: rounds in the order ABBA, the ratio
taken within a round, the formats of both sides and the read bandwidth of the same run printed. llama.cpp decodes
several sequences with its llama-batched-bench.
"""

from __future__ import annotations

import argparse
import contextlib
import json

from octavo.bench.figures import Spread, Workload
from octavo.bench.interleaved import measure
from octavo.bench.peers import check_peer, open_peer
from octavo.bench.report import Report, make_report
from octavo.bench.subject import Subject
from octavo.settings import Settings


def against(settings: Settings, peer: str, peer_model: str | None, workload: Workload, rounds: int) -> Report:
    with (
        contextlib.closing(Subject(settings, workload)) as subject,
        contextlib.closing(open_peer(peer, peer_model, subject.planned, workload)) as other,
    ):
        measured = measure(subject, other, rounds, lambda: None)
        return make_report(workload, subject.facts, other.facts, measured)


def shown(spread: Spread | None, scale: float = 1.0) -> str:
    if spread is None:
        return "-"
    return f"{spread.median / scale:.1f} ({spread.least / scale:.1f} .. {spread.most / scale:.1f})"


def print_report(report: Report) -> None:
    facts, peer = report.facts, report.peer_facts
    assert peer is not None
    assert report.peer is not None
    assert report.ratios is not None
    print(
        f"\n{report.workload.sequences} sequences, {facts.threads} threads, {facts.isa}: octavo {facts.quant} "
        f"against {peer.name} {peer.version}, {peer.format}{' (formats differ)' if report.formats_differ else ''}"
    )
    for name, ratio in report.ratios.items():
        ours, theirs = getattr(report.octavo, name), getattr(report.peer, name)
        print(
            f"  {name:28} {shown(ours):28} {shown(theirs):28} "
            f"{ratio.median:.2f}x ({ratio.least:.2f} .. {ratio.most:.2f})"
        )
    print(f"  read bandwidth, GB/s         {shown(report.read_bandwidth, 1e9)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="default: the default model")
    parser.add_argument("--quant", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--peer", action="append", required=True, metavar="NAME[=DETAIL]")
    parser.add_argument("--peer-model")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    for peer in arguments.peer:
        check_peer(peer)
    settings = Settings(model=arguments.model, quant=arguments.quant, device="cpu", threads=arguments.threads)
    for sequences in arguments.sequences:
        workload = Workload(arguments.prompt_tokens, arguments.new_tokens, sequences)
        for peer in arguments.peer:
            report = against(settings, peer, arguments.peer_model, workload, arguments.rounds)
            if arguments.json:
                print(json.dumps(report.to_json()), flush=True)
            else:
                print_report(report)


if __name__ == "__main__":
    main()
