"""A peer that is a Python library: it generates in a child process (`octavo.bench.child`), which answers for it."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.bench.child import Child
from octavo.bench.figures import Round, Workload
from octavo.bench.peer import PeerFacts


@dataclass(slots=True)
class ChildPeer:
    name: str
    child: Child
    """Answers a greeting with its version and load_seconds, and prompts with first_token_seconds, total_seconds and
    peak_bytes."""
    workload: Workload
    reads: str
    format: str
    peak_bytes: int | None = None

    @property
    def facts(self) -> PeerFacts:
        said = self.child.answer
        return PeerFacts(
            name=self.name,
            version=said["version"],
            reads=self.reads,
            format=self.format,
            load_seconds=said["load_seconds"],
            peak_bytes=self.peak_bytes,
        )

    def run(self, prompts: list[list[int]]) -> Round:
        took = self.child.ask({"prompts": prompts, "new_tokens": self.workload.new_tokens})
        self.peak_bytes = took["peak_bytes"]
        return Round.of_sequences(self.workload, [took["first_token_seconds"]], [took["total_seconds"]])

    def close(self) -> None:
        self.child.close()
