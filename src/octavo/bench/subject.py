"""Octavo as a user has it: `LLM.generate`, and what it takes to say how much of the machine that uses."""

from __future__ import annotations

import dataclasses
import math
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.bench.figures import Round, Workload
from octavo.bench.memory import ProcessMemory, process_memory
from octavo.llm import LLM
from octavo.loading import PlannedModel, plan_model
from octavo.runners.cpu import library
from octavo.runners.cpu.library import NativeUnavailableError
from octavo.settings import SamplingParams, Settings
from octavo.types import Progress


@dataclass(frozen=True, slots=True)
class Facts:
    """What does not change from round to round."""

    model: str
    quant: str
    device: str
    runner: str
    isa: str | None
    """Of the CPU runner."""
    threads: int | None
    processor: str
    context_tokens: int
    load_seconds: float
    packed_from_cache: bool
    weight_bytes_per_token: int
    """Packed weights that one decode step reads: all, but of a table that is not the head only a row."""


class Subject:
    """A loaded model. `close` gives its memory back."""

    def __init__(self, settings: Settings, workload: Workload, progress: Progress | None = None) -> None:
        """Raises what `LLM` raises. Where no context is asked for, it is what the workload takes."""
        needed = workload.prompt_tokens + workload.new_tokens
        settings = dataclasses.replace(
            settings, context=settings.context or needed, max_sequences=workload.sequences
        )
        self.planned = plan_model(settings, progress=progress)
        self._llm = LLM.from_settings(settings, progress=progress)
        self.workload = workload
        self._params = SamplingParams(
            max_new_tokens=workload.new_tokens, temperature=0.0, repetition_penalty=1.0, ignore_eos=True
        )
        self.notices = self._llm.notices
        self.facts = _facts(self.planned, self._llm.info())
        self.vocab_size = self.planned.spec.vocab_size

    def run(self, round_number: int) -> Round:
        prompts = self.workload.prompts(self.vocab_size, round_number)
        timings = [done.timings for done in self._llm.generate(prompts, self._params)]
        firsts = [each.first_token_seconds for each in timings if each.first_token_seconds is not None]
        return Round.of_sequences(self.workload, firsts, [each.total_seconds for each in timings])

    def memory(self) -> ProcessMemory:
        return process_memory()

    def read_bandwidth(self) -> float | None:
        """Bytes a second that as many threads read from memory now; None where the model is not on the CPU."""
        if self.planned.plan.config.device != "cpu":
            return None
        try:
            return library.read_bandwidth(self.facts.threads or 1)
        except (NativeUnavailableError, MemoryError):
            return None

    def close(self) -> None:
        self._llm.close()


def _facts(planned: PlannedModel, info: dict[str, Any]) -> Facts:
    plan = planned.plan
    on_cpu = plan.runner == "cpu"
    isa = (
        (planned.settings.isa if planned.settings.isa != "auto" else library.supported_isas()[-1])
        if on_cpu
        else None
    )
    return Facts(
        model=info["model"],
        quant=info["quant"],
        device=info["device"],
        runner=info["runner"],
        isa=isa,
        threads=plan.config.threads,
        processor=processor_name(),
        context_tokens=info["context_tokens"],
        load_seconds=info["load_seconds"],
        packed_from_cache=info["packed_from_cache"],
        weight_bytes_per_token=weight_bytes_per_token(planned),
    )


def weight_bytes_per_token(planned: PlannedModel) -> int:
    """Packed bytes of all weights but a table that is not the head, of which a step reads a row."""
    head_is_apart = not planned.spec.tied_head
    return sum(
        planned.plan.formats[parameter.name].nbytes(math.prod(parameter.shape[:-1]), parameter.shape[-1])
        for parameter in planned.parameters
        if not (head_is_apart and parameter.role == "embedding")
    )


def processor_name() -> str:
    """As the maker calls it, or what Python knows."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
