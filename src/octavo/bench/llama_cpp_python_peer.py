"""llama.cpp as a peer through llama-cpp-python, for those who have no llama-bench; one sequence only."""

from __future__ import annotations

import importlib.util

from octavo.bench.child import Child
from octavo.bench.child_peer import ChildPeer
from octavo.bench.figures import Workload
from octavo.bench.llama_cpp import gguf_file
from octavo.bench.peer import Checkpoint, Peer
from octavo.errors import UsageError


def is_installed() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def llama_cpp_python_peer(
    checkpoint: Checkpoint, workload: Workload, *, threads: int | None, device: str
) -> Peer:
    """Raises UsageError for several sequences, and where the checkpoint is no GGUF file."""
    file = gguf_file(checkpoint)
    if workload.sequences > 1:
        raise UsageError(
            "llama-cpp-python decodes one sequence at a time",
            remedy="Install llama.cpp's own llama-bench and llama-batched-bench, or use --batch 1.",
        )
    hello = {
        "model": str(file),
        "threads": threads,
        "gpu": device != "cpu",
        "context_tokens": workload.prompt_tokens + workload.new_tokens,
    }
    child = Child("octavo.bench.llama_cpp_child", "llama-cpp-python", hello)
    return ChildPeer("llama.cpp", child, workload, str(file), checkpoint.format or "full precision")
