"""What runs where and why, of a loaded model: the facts of `octavo explain` and `LLM.explain`.

Puts together what the plan decided and what the running backend says; decides and measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from octavo.loading import PlannedModel
from octavo.models.spec import LayerSpec, MoE


def explain(model: PlannedModel, running: Mapping[str, Any]) -> dict[str, Any]:
    """Plain dicts, lists, numbers and strings. `running`: what the backend's `info` says."""
    plan = model.plan
    return {
        "model": model.source.location,
        "revision": model.source.revision,
        "device": {"name": plan.config.device, "reason": model.device_reason, "card": running["card"]},
        "runner": {
            "name": plan.runner,
            "layout": plan.layout,
            "threads": plan.config.threads,
            "compute_dtype": plan.dtypes.compute,
            "kv_dtype": plan.dtypes.kv,
            "kernels": dict(running["kernels"]),
            "batch_invariant": running["batch_invariant"],
            "chunk_invariant": running["chunk_invariant"],
        },
        "declined": [{"runner": each.runner, "reason": each.reason} for each in plan.declined],
        "formats": [
            {"format": part.format, "tensors": part.tensors, "packed_bytes": part.packed_bytes}
            for part in plan.weights
        ],
        "layers": list(_layers(model)),
        "kv": [
            {"window": group.window, "layers": group.layers, "pages": group.pages, "bytes": group.nbytes}
            for group in plan.kv
        ],
        "speculation": _speculation(model, running),
        "grammars": "JSON schema, regular expressions and Lark, through llguidance; masks are made in lockstep",
        "logits_processors": "in lockstep: a step waits for them, and the next one for its token",
        "reasons": list(plan.reasons),
        "warnings": list(plan.warnings),
        "memory": dict(running["memory"]),
        "compiled": dict(running["compiled"]),
        "counters": dict(running["engine"]),
    }


def _layers(model: PlannedModel) -> Iterator[dict[str, Any]]:
    """Embedding, runs of layers that are alike, and head: what each is and how it is stored."""
    formats, spec = model.plan.formats, model.spec
    where = model.plan.config.device

    def stored(prefix: str) -> list[str]:
        found = {
            formats[parameter.name].name: None
            for parameter in model.parameters
            if parameter.name.startswith(prefix) and parameter.role != "vector"
        }
        return list(found)

    yield {"layers": "embedding", "what": f"{spec.vocab_size} x {spec.hidden_size}"} | _at(
        where, stored("embedding.")
    )
    described = [(_what(layer), tuple(stored(f"layers.{i}."))) for i, layer in enumerate(spec.layers)]
    first = 0
    for (what, kept), alike in groupby(described):
        last = first + len(list(alike)) - 1
        name = f"layer {first}" if first == last else f"layers {first} to {last}"
        yield {"layers": name, "what": what} | _at(where, list(kept))
        first = last + 1
    head = stored("embedding.") if spec.tied_head else stored("head.")
    yield {"layers": "head", "what": "tied to the embedding" if spec.tied_head else "its own"} | _at(
        where, head
    )


def _at(where: str, formats: list[str]) -> dict[str, Any]:
    return {"device": where, "formats": formats}


def _what(layer: LayerSpec) -> str:
    mixer, ffn = layer.mixer, layer.ffn
    reach = "whole context" if mixer.window is None else f"window of {mixer.window}"
    heads = f"{mixer.heads} heads over {mixer.kv_heads} of keys, {mixer.head_dim} dims"
    width = f"{ffn.hidden_size} {ffn.activation}"
    if isinstance(ffn, MoE):
        width = f"{ffn.experts_per_token} of {ffn.experts} experts a token, {width}"
    return f"{type(mixer).__name__} ({heads}, {reach}), {type(ffn).__name__} ({width})"


def _speculation(model: PlannedModel, running: Mapping[str, Any]) -> str:
    if model.settings.speculation == "off":
        return "off, as asked"
    if not running["chunk_invariant"]:
        return (
            f"off: the {model.plan.runner} runner's results depend on how many tokens are computed together"
        )
    if not running["takes_drafts"]:
        return f"off: the {model.plan.runner} runner verifies no guesses"
    return "prompt lookup, verified in the same step: it never changes the output"
