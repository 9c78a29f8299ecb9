"""llama.cpp as a peer, through its own benchmarks: llama-bench, and llama-batched-bench for several sequences.

Both load the file anew each round and are not told the prompts, only their length.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from octavo.bench.figures import Round, Workload
from octavo.bench.peer import Checkpoint, PeerFacts
from octavo.errors import IncompatibleModelError, UsageError

LLAMA_BENCH = "llama-bench"
_BATCHED = "llama-batched-bench"


class LlamaCppPeer:
    def __init__(
        self,
        checkpoint: Checkpoint,
        workload: Workload,
        *,
        program: str | None,
        threads: int | None,
        device: str,
    ) -> None:
        """`program` is llama-bench; None: the one on PATH. Raises UsageError where it or a GGUF file is missing."""
        self._file = gguf_file(checkpoint)
        self._format = checkpoint.format or "full precision"
        self._bench = find_llama_bench(program)
        self._workload = workload
        self._options = ["-ngl", "0" if device == "cpu" else "99"]
        if threads is not None:
            self._options += ["-t", str(threads)]
        self._batched: Path | None = None
        if workload.sequences > 1:
            self._batched = self._bench.with_name(self._bench.name.replace(LLAMA_BENCH, _BATCHED))
            if not self._batched.exists():
                raise UsageError(
                    f"{_BATCHED} is not beside {self._bench}, and {LLAMA_BENCH} runs one sequence",
                    remedy=f"Build llama.cpp's target {_BATCHED}, or use --batch 1.",
                )
        self._version = "unknown"

    @property
    def facts(self) -> PeerFacts:
        return PeerFacts(
            name="llama.cpp",
            version=self._version,
            reads=str(self._file),
            format=self._format,
            load_seconds=None,
            peak_bytes=None,
        )

    def run(self, prompts: list[list[int]]) -> Round:
        prefill, decode = self._alone() if self._batched is None else self._together(self._batched)
        load = self._workload
        every_first = load.sequences * load.prompt_tokens / prefill
        total = every_first + load.sequences * load.new_tokens / decode
        return Round(
            prefill_tokens_per_second=prefill,
            decode_tokens_per_second=decode,
            first_token_seconds=every_first,
            total_tokens_per_second=load.sequences * (load.prompt_tokens + load.new_tokens) / total,
        )

    def close(self) -> None: ...

    def _alone(self) -> tuple[float, float]:
        """Tokens a second of prefill, and of decoding after a prompt of the same length."""
        rates = []
        for test in (["-p", self._prompt, "-n", "0"], ["-p", "0", "-n", self._new, "-d", self._prompt]):
            (row,) = json.loads(self._output(self._bench, [*test, "-r", "1", "-o", "json"]))
            self._version = f"{row['build_number']} ({row['build_commit']})"
            rates.append(float(row["avg_ts"]))
        return rates[0], rates[1]

    def _together(self, program: Path) -> tuple[float, float]:
        sequences = self._workload.sequences
        context = sequences * (self._workload.prompt_tokens + self._workload.new_tokens)
        sizes = ["-npp", self._prompt, "-ntg", self._new, "-npl", str(sequences), "-c", str(context)]
        output = self._output(program, [*sizes, "--output-format", "jsonl"])
        (row,) = (_row(line) for line in output.splitlines() if line.startswith("{"))
        return float(row["speed_pp"]), float(row["speed_tg"])

    @property
    def _prompt(self) -> str:
        return str(self._workload.prompt_tokens)

    @property
    def _new(self) -> str:
        return str(self._workload.new_tokens)

    def _output(self, program: Path, arguments: Sequence[str]) -> str:
        command = [str(program), "-m", str(self._file), *self._options, *arguments]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
            )
        except OSError as error:
            raise UsageError(
                f"{program} does not start: {error.strerror}",
                remedy="Give llama-bench: --peer llama.cpp=PATH",
            ) from error
        except subprocess.CalledProcessError as error:
            said = error.stderr.strip().splitlines()
            raise IncompatibleModelError(
                f"{program.name} failed with status {error.returncode}: {said[-1] if said else 'no message'}",
                remedy=f"See what it says: {' '.join(command)}",
            ) from error
        return done.stdout


def _row(line: str) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(line)
    return row


def gguf_file(checkpoint: Checkpoint) -> Path:
    """Raises UsageError where the checkpoint is none."""
    if checkpoint.path is None or not checkpoint.path.is_file():
        raise UsageError(
            f"llama.cpp reads GGUF files, and {checkpoint.source.location} is none",
            remedy="Name the same model as one: --peer-model FILE.gguf",
        )
    return checkpoint.path


def find_llama_bench(program: str | None) -> Path:
    """`program`, or the one on PATH. Raises UsageError."""
    found = shutil.which(program or LLAMA_BENCH)
    if found is None:
        raise UsageError(
            f"{LLAMA_BENCH} is not on PATH" if program is None else f"there is no program {program}",
            remedy="Install llama.cpp, which has it (brew install llama.cpp, or build its target llama-bench), "
            "or say where it is: --peer llama.cpp=PATH; or pip install llama-cpp-python",
        )
    return Path(found)
