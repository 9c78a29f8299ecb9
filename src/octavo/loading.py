"""From what the user named to a backend that is ready: source, spec, plan, weights, runner, engine.

The order is the point: nothing is read before the plan says that it fits, and nothing after it decides anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from octavo.backends.base import Backend
from octavo.backends.native import NativeBackend
from octavo.devices import choose_device, read_machine
from octavo.models import build_model
from octavo.models.parameters import Parameter
from octavo.models.spec import ModelSpec
from octavo.plan import LoadPlan, make_plan
from octavo.quant.format import Format
from octavo.runners import runner_kinds
from octavo.settings import Settings
from octavo.sources.resolve import resolve
from octavo.types import ModelSource, Progress
from octavo.validate import validate_settings
from octavo.weights import choose_formats, open_weights

_SMALLER_QUANTS = ("int8", "llm-int8")
"""What a refusal may suggest instead."""


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model that was found and fits; no weight has been read."""

    settings: Settings
    source: ModelSource
    spec: ModelSpec
    parameters: tuple[Parameter, ...]
    plan: LoadPlan
    device_reason: str
    """How the device was chosen; for auto, why not a better one."""


def plan_model(settings: Settings, *, progress: Progress | None = None) -> PlannedModel:
    """Find the model (downloading it if need be) and decide from headers alone how it will run.

    Raises what resolving, `build_model` and `make_plan` raise: among them NotEnoughMemoryError, before
    anything is loaded.
    """
    settings = validate_settings(settings)
    machine = read_machine(settings.device)
    device = choose_device(settings.device, machine)
    source = resolve(
        settings.model,
        revision=settings.revision,
        offline=settings.offline,
        cache_dir=settings.cache_dir,
        progress=progress,
    )
    spec, parameters = build_model(source.config, source.naming)

    def formats(quant: str) -> Mapping[str, Format]:
        return choose_formats(parameters, source.tensors, quant)

    plan = make_plan(
        settings=settings,
        spec=spec,
        parameters=parameters,
        formats=formats(settings.quant),
        file_bytes={name: tensor.nbytes for name, tensor in source.tensors.items()},
        kinds=runner_kinds(settings.runner, settings.isa),
        machine=machine,
        device=device,
        alternatives={name: formats(name) for name in _SMALLER_QUANTS if name != settings.quant},
    )
    return PlannedModel(settings, source, spec, parameters, plan, device.reason)


@dataclass(frozen=True, slots=True)
class LoadedBackend:
    backend: Backend
    packed_from_cache: bool
    notices: tuple[str, ...]


def load_backend(model: PlannedModel, *, progress: Progress | None = None) -> LoadedBackend:
    """Pack the weights (or map the packed cache), build the runner and the engine on it."""
    plan = model.plan
    (kind,) = (
        kind for kind in runner_kinds(model.settings.runner, model.settings.isa) if kind.name == plan.runner
    )
    weights = open_weights(
        model=kept_name(model.source.location),
        fingerprint=model.source.fingerprint,
        tensors=model.source.tensors,
        parameters=model.parameters,
        formats=plan.formats,
        layout=kind.layout,
        cache_dir=model.settings.cache_dir,
        use_cache=model.settings.cache,
        progress=progress,
    )
    try:
        runner = kind.create(model.spec, weights, plan.config)
    except BaseException:
        weights.close()
        raise
    try:
        backend = NativeBackend(runner, plan.config, model.spec, weights.digest)
    except BaseException:
        runner.close()
        raise
    return LoadedBackend(backend, weights.from_cache, (*weights.notices, *_slower_runner(plan)))


def _slower_runner(plan: LoadPlan) -> tuple[str, ...]:
    """Why the fast runner of this CPU is not taken: what a user would otherwise only notice as slowness."""
    if plan.config.device != "cpu":
        return ()
    return tuple(
        f"the {plan.runner} runner takes the place of the faster {each.runner} runner: {each.reason}"
        for each in plan.declined
    )


def kept_name(location: str) -> str:
    """The name of a model's packed weights in the cache: a path in full, since "./model" is many."""
    path = Path(location)
    return str(path.absolute()) if path.exists() else location
