"""From what the user named to a backend that is ready: source, spec, plan, weights, runner, engine.

The order is the point: nothing is read before the plan says that it fits, and nothing after it decides anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from octavo.backends.base import Backend
from octavo.backends.native import NativeBackend
from octavo.devices import choose_device, read_machine
from octavo.engine.drafting import PromptLookup
from octavo.engine.hooks import CompileGrammar, MakeDrafter
from octavo.errors import InvalidParameterError
from octavo.load_plan import LoadPlan
from octavo.models import build_model
from octavo.models.own_head import own_head_notices
from octavo.models.parameters import Parameter
from octavo.models.spec import ModelSpec
from octavo.models.unread import unread_notices, unread_tensors
from octavo.plan import make_plan
from octavo.quant.checkpoint import open_quantized
from octavo.quant.format import Format
from octavo.runners import runner_kinds
from octavo.runners.base import Runner, RunnerKind
from octavo.settings import Settings
from octavo.sources.resolve import resolve
from octavo.types import LoadState, ModelSource, Progress
from octavo.validate import validate_settings
from octavo.weights import WeightStore, choose_formats, open_weights

_SMALLER_QUANTS = ("int8", "llm-int8", "int4")
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
    source = open_quantized(source)
    spec, parameters = build_model(
        source.config, source.naming, tensors=source.tensors, context_tokens=settings.context
    )

    unread = unread_tensors(spec, parameters, source.naming, source.tensors)
    notices = (*unread_notices(unread, spec.family), *own_head_notices(spec, source.config))
    source = replace(source, notices=(*source.notices, *notices))

    def formats(quant: str) -> Mapping[str, Format]:
        return choose_formats(parameters, source.tensors, quant)

    plan = make_plan(
        settings=settings,
        spec=spec,
        parameters=parameters,
        formats=formats(settings.quant),
        file_bytes={name: tensor.nbytes for name, tensor in source.tensors.items()},
        kinds=runner_kinds(settings.runner, settings.isa, settings.activations),
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


def load_backend(
    model: PlannedModel,
    *,
    compile_grammar: CompileGrammar | None = None,
    progress: Progress | None = None,
    on_state: Callable[[LoadState], None] | None = None,
) -> LoadedBackend:
    """Pack the weights (or map the packed cache), build the runner and the engine on it.

    `compile_grammar` None: requests with a grammar are refused. `on_state` is told when loading and warming begin.
    Raises InvalidParameterError where speculation was asked for and would change the output.
    """
    plan, kind = model.plan, _kind(model)
    enter = on_state or (lambda _: None)
    enter("loading")
    kind.preload(plan.config)
    weights = stored_weights(model, progress)
    enter("warming")
    try:
        runner = kind.create(model.spec, weights, plan.config)
    except BaseException:
        weights.close()
        raise
    try:
        backend = NativeBackend(
            runner,
            plan.config,
            model.spec,
            weights.digest,
            compile_grammar=compile_grammar,
            make_drafter=_drafter(model.settings, runner),
        )
    except BaseException:
        runner.close()
        raise
    return LoadedBackend(backend, weights.from_cache, (*weights.notices, *_slower_runner(plan)))


def stored_weights(model: PlannedModel, progress: Progress | None) -> WeightStore:
    """The weights as the planned runner lays them out: mapped from the packed cache, or packed now."""
    return open_weights(
        model=kept_name(model.source.location),
        fingerprint=model.source.fingerprint,
        tensors=model.source.tensors,
        parameters=model.parameters,
        formats=model.plan.formats,
        layout=_kind(model).layout,
        cache_dir=model.settings.cache_dir,
        use_cache=model.settings.cache,
        progress=progress,
    )


def _slower_runner(plan: LoadPlan) -> tuple[str, ...]:
    """Why the fast runner of this device is not taken: what a user would otherwise only notice as slowness."""
    own = plan.config.device.partition(":")[0]  # it has the device's name
    return tuple(
        f"the {plan.runner} runner takes the place of the faster {each.runner} runner: {each.reason}"
        for each in plan.declined
        if each.runner == own
    )


def _drafter(settings: Settings, runner: Runner) -> MakeDrafter | None:
    """Guessing is exact where results do not depend on how tokens are cut into chunks, and pays where several
    rows cost little more than one: on the native runners."""
    if settings.speculation == "prompt-lookup" and not runner.info.chunk_invariant:
        raise InvalidParameterError(
            f"speculation prompt-lookup and runner {runner.info.name} contradict each other: its results depend on "
            "how many tokens are computed together, so guesses would change the output",
            remedy="Leave speculation at auto, or take --runner cpu.",
            parameter="speculation",
        )
    if settings.speculation == "prompt-lookup" and not runner.info.takes_drafts:
        raise InvalidParameterError(
            f"speculation prompt-lookup and runner {runner.info.name} contradict each other: it verifies no guesses",
            remedy="Leave speculation at auto, or take --runner cpu.",
            parameter="speculation",
        )
    return None if settings.speculation == "off" or not runner.info.may_speculate else PromptLookup


def _kind(model: PlannedModel) -> RunnerKind:
    settings = model.settings
    kinds = runner_kinds(settings.runner, settings.isa, settings.activations)
    (kind,) = (kind for kind in kinds if kind.name == model.plan.runner)
    return kind


def kept_name(location: str) -> str:
    """The name of a model's packed weights in the cache: a path in full, since "./model" is many."""
    path = Path(location)
    return str(path.absolute()) if path.exists() else location
