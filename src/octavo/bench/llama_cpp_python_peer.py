"""llama.cpp as a peer through llama-cpp-python, for those who have no llama-bench; one sequence only."""

from __future__ import annotations

import importlib.util

from octavo.bench.child import Child
from octavo.bench.figures import Round, Workload
from octavo.bench.llama_cpp import gguf_file
from octavo.bench.peer import Checkpoint, PeerFacts
from octavo.errors import UsageError


def is_installed() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


class LlamaCppPythonPeer:
    def __init__(
        self, checkpoint: Checkpoint, workload: Workload, *, threads: int | None, device: str
    ) -> None:
        """Raises UsageError for several sequences, and where the checkpoint is no GGUF file."""
        file = gguf_file(checkpoint)
        if workload.sequences > 1:
            raise UsageError(
                "llama-cpp-python decodes one sequence at a time",
                remedy="Install llama.cpp's own llama-bench and llama-batched-bench, or use --batch 1.",
            )
        self._workload = workload
        self._reads = str(file)
        self._format = checkpoint.format or "full precision"
        self._peak_bytes: int | None = None
        self._child = Child(
            "octavo.bench.llama_cpp_child",
            "llama-cpp-python",
            {
                "model": str(file),
                "threads": threads,
                "gpu": device != "cpu",
                "context_tokens": workload.prompt_tokens + workload.new_tokens,
            },
        )

    @property
    def facts(self) -> PeerFacts:
        said = self._child.answer
        return PeerFacts(
            name="llama.cpp",
            version=said["version"],
            reads=self._reads,
            format=self._format,
            load_seconds=said["load_seconds"],
            peak_bytes=self._peak_bytes,
        )

    def run(self, prompts: list[list[int]]) -> Round:
        took = self._child.ask({"prompts": prompts, "new_tokens": self._workload.new_tokens})
        self._peak_bytes = took["peak_bytes"]
        return Round.of_sequences(self._workload, [took["first_token_seconds"]], [took["total_seconds"]])

    def close(self) -> None:
        self._child.close()
