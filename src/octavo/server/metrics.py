"""What /metrics shows: counters and histograms of the front, and each model's own counters asked at that moment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """One registry a server; labels are routes, states and model names, never anything a client wrote."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "octavo_requests", "Requests answered.", ("route", "status"), registry=self.registry
        )
        self.tokens = Counter(
            "octavo_tokens", "Tokens of answered requests.", ("kind",), registry=self.registry
        )
        self.first_token = Histogram(
            "octavo_first_token_seconds",
            "Submitted to first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.queued = Histogram(
            "octavo_queued_seconds", "Waiting for a slot.", buckets=_SECONDS, registry=self.registry
        )
        self.duration = Histogram(
            "octavo_request_seconds", "Whole requests.", ("route",), buckets=_SECONDS, registry=self.registry
        )
        self.waiting = Gauge(
            "octavo_waiting_requests", "Waiting for their first token.", registry=self.registry
        )
        self.waiting_tokens = Gauge("octavo_waiting_tokens", "Prompt tokens waiting.", registry=self.registry)
        self.refused = Gauge(
            "octavo_refused_requests", "Refused with 429 since the start.", registry=self.registry
        )
        self.restarts = Gauge(
            "octavo_worker_restarts", "Workers that died since the start.", registry=self.registry
        )
        self.evictions = Gauge("octavo_evictions", "Models unloaded for another.", registry=self.registry)

    def page(self, models: Mapping[str, Mapping[str, Any]]) -> bytes:
        """The text format; `models` are each loaded model's facts by name."""
        self._facts = _ModelFacts(models)
        self.registry.register(self._facts)
        try:
            return generate_latest(self.registry)
        finally:
            self.registry.unregister(self._facts)


class _ModelFacts:
    """Numbers of `Backend.info()`, flattened: engine.steps is octavo_engine_steps{model=...}."""

    def __init__(self, models: Mapping[str, Mapping[str, Any]]) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        families: dict[str, GaugeMetricFamily] = {}
        for name, facts in self._models.items():
            for part in ("engine", "compiled", "process", "card"):
                for key, value in _numbers(facts.get(part, {})):
                    self._add(families, f"octavo_{part}_{key}", ("model",), (name,), value)
            for key, value in _numbers(facts.get("memory", {})):
                self._add(families, "octavo_memory_bytes", ("model", "part"), (name, key), value)
        return families.values()

    def _add(
        self,
        families: dict[str, GaugeMetricFamily],
        metric: str,
        labels: tuple[str, ...],
        values: tuple[str, ...],
        number: float,
    ) -> None:
        family = families.setdefault(
            metric, GaugeMetricFamily(metric, "From the model's worker.", labels=labels)
        )
        family.add_metric(values, number)


def _numbers(facts: Any, prefix: str = "") -> Iterable[tuple[str, float]]:
    if not isinstance(facts, Mapping):
        return
    for key, value in facts.items():
        name = f"{prefix}{key}".lower()
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{name}_")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield "".join(c if c.isalnum() else "_" for c in name), float(value)
