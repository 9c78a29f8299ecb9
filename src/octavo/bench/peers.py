"""Which peers there are, and what each is given to read."""

from __future__ import annotations

import shutil
from pathlib import Path

from octavo.bench.figures import Workload
from octavo.bench.llama_cpp import LLAMA_BENCH, LlamaCppPeer, find_llama_bench
from octavo.bench.llama_cpp_python_peer import is_installed, llama_cpp_python_peer
from octavo.bench.peer import Checkpoint, Peer
from octavo.bench.transformers_peer import DEFAULT_MODE, MODES, require_transformers, transformers_peer
from octavo.errors import UsageError
from octavo.loading import PlannedModel
from octavo.sources import default
from octavo.sources.resolve import resolve

TRANSFORMERS = "transformers"
LLAMA_CPP = "llama.cpp"


def check_peer(said: str) -> tuple[str, str | None]:
    """`NAME` or `NAME=DETAIL` in two. Raises UsageError for names and modes there are not, and where the peer
    is not installed."""
    name, _, detail = said.partition("=")
    if name not in (TRANSFORMERS, LLAMA_CPP):
        raise UsageError(
            f"there is no peer {name!r}", remedy=f"Use --peer {TRANSFORMERS} or --peer {LLAMA_CPP}."
        )
    if name == TRANSFORMERS and detail and detail not in MODES:
        raise UsageError(
            f"transformers does not run as {detail!r} here",
            remedy=f"Use --peer {TRANSFORMERS}=MODE with MODE one of {', '.join(MODES)}.",
        )
    if name == TRANSFORMERS:
        require_transformers()
    elif not _by_binding(detail):
        find_llama_bench(detail or None)
    return name, detail or None


def open_peer(said: str, model: str | None, planned: PlannedModel, workload: Workload) -> Peer:
    """The peer, loaded. `model` is what it reads instead of the planned model.

    Raises UsageError where it is not installed or cannot read such a model, and IncompatibleModelError where
    it fails.
    """
    name, detail = check_peer(said)
    checkpoint = _checkpoint(model, planned)
    config = planned.plan.config
    if name == TRANSFORMERS:
        return transformers_peer(
            checkpoint,
            workload,
            mode=detail or DEFAULT_MODE,
            threads=config.threads,
            device=config.device,
        )
    if _by_binding(detail):
        return llama_cpp_python_peer(checkpoint, workload, threads=config.threads, device=config.device)
    return LlamaCppPeer(checkpoint, workload, program=detail, threads=config.threads, device=config.device)


def _by_binding(program: str | None) -> bool:
    """llama-cpp-python stands in where no program is named and none is on PATH."""
    return not program and shutil.which(LLAMA_BENCH) is None and is_installed()


def _checkpoint(model: str | None, planned: PlannedModel) -> Checkpoint:
    settings = planned.settings
    source = planned.source
    if model is not None:
        source = resolve(model, offline=settings.offline, cache_dir=settings.cache_dir)
    is_default = source.location == default.NAME
    path = default.locate(settings.cache_dir) if is_default else Path(source.location).expanduser()
    return Checkpoint(source, path if path is not None and path.exists() else None)
