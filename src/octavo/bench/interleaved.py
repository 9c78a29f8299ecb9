"""Rounds of Octavo and a peer in the order ABBA, the machine's read bandwidth among them.

What else the machine does falls on all alike, and a ratio is taken within a round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from octavo.bench.figures import Round
from octavo.bench.memory import ProcessMemory
from octavo.bench.peer import Peer
from octavo.bench.subject import Subject


@dataclass(frozen=True, slots=True)
class Measured:
    """One entry a round."""

    octavo: tuple[Round, ...]
    peer: tuple[Round, ...]
    """Empty without one."""
    read_bandwidth: tuple[float, ...]
    """Bytes a second; empty where the model is not on the CPU."""
    memory: ProcessMemory
    """Of this process after the first generation, before the bandwidth's own buffer."""


def measure(subject: Subject, peer: Peer | None, rounds: int, done: Callable[[], None]) -> Measured:
    """`done` is called after each round, and after the one that warms up and is not counted."""
    prompts = subject.workload.prompts

    def run_peer(number: int) -> list[Round]:
        return [] if peer is None else [peer.run(prompts(subject.vocab_size, number))]

    subject.run(rounds)
    memory = subject.memory()
    run_peer(rounds)
    done()
    octavo: list[Round] = []
    theirs: list[Round] = []
    bandwidth: list[float] = []
    for number in range(rounds):
        peer_first = number % 2 == 1
        if peer_first:
            theirs += run_peer(number)
        octavo.append(subject.run(number))
        if (read := subject.read_bandwidth()) is not None:
            bandwidth.append(read)
        if not peer_first:
            theirs += run_peer(number)
        done()
    return Measured(tuple(octavo), tuple(theirs), tuple(bandwidth), memory)
