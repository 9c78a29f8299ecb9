"""Tiny random models of every structural flag, run by the native runner in each instruction set of this machine,
and by the reference runner on the same packed weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from tiny_models import MODELS, Driver, Tiny, attention, layer, make_tiny, model, prompt

from octavo.models.spec import DenseMLP, ModelSpec
from octavo.runners.base import Runner
from octavo.runners.cpu.library import ISA_NAMES, IsaName, NativeUnavailableError, supported_isas


@pytest.fixture(scope="session")
def isas() -> tuple[IsaName, ...]:
    try:
        return supported_isas()
    except NativeUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(params=ISA_NAMES)
def isa(request: pytest.FixtureRequest, isas: tuple[IsaName, ...]) -> IsaName:
    if request.param not in isas:
        pytest.skip(f"this machine has no {request.param}")
    name: IsaName = request.param
    return name


@pytest.fixture(params=list(MODELS))
def spec(request: pytest.FixtureRequest) -> ModelSpec:
    return MODELS[request.param]


@pytest.fixture
def flags() -> Mapping[str, ModelSpec]:
    return MODELS


@pytest.fixture
def tiny() -> Callable[..., Tiny]:
    return make_tiny


@pytest.fixture
def models() -> Callable[..., ModelSpec]:
    """A plain model of a hidden size and an MLP size; more fields are the attention's."""

    def sized(hidden: int, fed: int, **changes: Any) -> ModelSpec:
        both = layer(attention(**changes), DenseMLP(fed, "silu"))
        return model(both, both, hidden_size=hidden)

    return sized


@pytest.fixture
def drive() -> Iterator[Callable[[ModelSpec, Runner], Driver]]:
    """Drivers whose runners are closed when the test ends."""
    made: list[Driver] = []

    def start(spec: ModelSpec, runner: Runner) -> Driver:
        made.append(Driver(spec, runner))
        return made[-1]

    yield start
    for driver in made:
        driver.runner.close()


@pytest.fixture
def tokens() -> Callable[..., tuple[int, ...]]:
    return prompt
