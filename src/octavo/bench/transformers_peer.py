"""transformers as a peer: `model.generate` in a process of its own, eager or compiled."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from octavo.bench.child import Child
from octavo.bench.child_peer import ChildPeer
from octavo.bench.figures import Workload
from octavo.bench.peer import Checkpoint, Peer
from octavo.errors import UsageError


@dataclass(frozen=True, slots=True)
class Mode:
    dtype: str
    compiled: bool = False
    """torch.compile makes the forward pass, with a static cache."""
    int8: bool = False
    """Linears are torch's own weight-only int8, a scale a row."""

    def in_words(self) -> str:
        words = [self.dtype]
        if self.int8:
            words = ["int8 by torch._weight_int8pack_mm, the table in bfloat16"]
        return ", ".join([*words, "compiled"] if self.compiled else words)


MODES = {
    "bf16": Mode("bfloat16"),
    "fp32": Mode("float32"),
    "int8": Mode("bfloat16", int8=True),
    "bf16-compiled": Mode("bfloat16", compiled=True),
    "fp32-compiled": Mode("float32", compiled=True),
}
"""What may follow `transformers=`."""

DEFAULT_MODE = "bf16"


def require_transformers() -> None:
    """Raises UsageError where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise UsageError(
            "transformers is not installed", remedy="pip install transformers, or leave --peer out."
        )


def transformers_peer(
    checkpoint: Checkpoint, workload: Workload, *, mode: str, threads: int | None, device: str
) -> Peer:
    """Raises UsageError where transformers is not installed, IncompatibleModelError where it cannot load."""
    require_transformers()
    chosen = MODES[mode]
    path = checkpoint.path
    is_file = path is not None and path.is_file()
    if is_file and importlib.util.find_spec("gguf") is None:
        raise UsageError(
            "transformers needs the gguf package to read a GGUF file",
            remedy="pip install gguf, or give --peer-model a folder.",
        )
    source = checkpoint.source
    hello = {
        "model": source.location if path is None else str(path.parent if is_file else path),
        "revision": source.revision if path is None else None,
        "gguf_file": path.name if path is not None and is_file else None,
        "dtype": chosen.dtype,
        "compiled": chosen.compiled,
        "int8": chosen.int8,
        "threads": threads,
        "device": device,
    }
    computes_in = chosen.in_words()
    if checkpoint.format:
        computes_in += f", from {checkpoint.format} dequantized"
    child = Child("octavo.bench.transformers_child", "transformers", hello)
    return ChildPeer("transformers", child, workload, source.location, computes_in)
