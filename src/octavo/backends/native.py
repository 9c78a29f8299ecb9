"""The Backend contract over our own engine and runner; nothing is decided here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from octavo.backends.base import Capabilities
from octavo.devices import open_device_card
from octavo.engine.engine import MIXED_PREFILL_TOKENS, Engine
from octavo.engine.hooks import CompileGrammar, MakeDrafter
from octavo.models.spec import ModelSpec
from octavo.runners.base import Runner, RunnerConfig
from octavo.types import Request, TokenEvent

MAX_LOGPROBS = 20
"""Alternatives a request may ask for at each token: OpenAI's limit."""


class NativeBackend:
    """Owns `runner`, and closes it. Arguments are those of `octavo.engine.engine.Engine`."""

    def __init__(
        self,
        runner: Runner,
        config: RunnerConfig,
        spec: ModelSpec,
        weights_digest: str,
        *,
        reuse_prefixes: bool = True,
        mixed_prefill_tokens: int = MIXED_PREFILL_TOKENS,
        compile_grammar: CompileGrammar | None = None,
        make_drafter: MakeDrafter | None = None,
    ) -> None:
        self._runner_info = runner.info
        self._card = open_device_card(config.device)
        self._engine = Engine(
            runner,
            config,
            spec,
            weights_digest,
            reuse_prefixes=reuse_prefixes,
            mixed_prefill_tokens=mixed_prefill_tokens,
            compile_grammar=compile_grammar,
            make_drafter=make_drafter,
        )
        self._capabilities = Capabilities(
            vocab_size=spec.vocab_size,
            context_tokens=self._engine.context_tokens,
            prompt_logprobs=True,
            max_logprobs=MAX_LOGPROBS,
            adapters=False,
            grammars=compile_grammar is not None,
        )

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def submit(self, request: Request) -> int:
        return self._engine.submit(request)

    def cancel(self, request_id: int) -> None:
        self._engine.cancel(request_id)

    def step(self, timeout_seconds: float) -> list[TokenEvent]:
        return self._engine.step(timeout_seconds)

    def info(self) -> Mapping[str, Any]:
        """What the runner is, its memory and compiled counters, and under `engine` the step loop's counters.

        `card`: what `octavo.nvml` reads at that moment; None where nobody says.
        """
        engine = self._engine.info()
        memory, compiled = engine.pop("memory"), engine.pop("compiled")
        card = None if self._card is None else self._card.read()
        return {
            "backend": "native",
            "runner": self._runner_info.name,
            "device": self._runner_info.device,
            "layout": self._runner_info.layout,
            "compute_dtype": self._runner_info.compute_dtype,
            "kv_dtype": self._runner_info.kv_dtype,
            "kernels": dict(self._runner_info.kernels),
            "batch_invariant": self._runner_info.batch_invariant,
            "chunk_invariant": self._runner_info.chunk_invariant,
            "takes_drafts": self._runner_info.takes_drafts,
            "memory": memory,
            "card": None if card is None else card.to_json(),
            "compiled": asdict(compiled),
            "engine": engine,
        }

    def close(self) -> None:
        self._engine.close()
        if self._card is not None:
            self._card.close()
