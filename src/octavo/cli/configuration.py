"""Which setting holds, and where it was said: flag, then OCTAVO_*, then [models.NAME], then octavo.toml.

octavo.toml is read in the working folder, then in the user's config folder. What nobody said stays at the
dataclass default, and the model's own values come in later (`octavo.validate`). Reading the layers is
`octavo.cli.layers`' work.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.cli.layers import Alias, File, Layer, Said, read_environment, read_file
from octavo.errors import InvalidParameterError, UsageError
from octavo.server.settings import ServerSettings
from octavo.settings import SamplingParams, Settings

FILE_NAME = "octavo.toml"
FLAG = "flag"
"""The origin of what was said on the command line."""


@dataclasses.dataclass(frozen=True, slots=True)
class Resolved:
    """What holds for one model. `origins` names the layer of each field that was said anywhere."""

    settings: Settings
    sampling: SamplingParams
    origins: Mapping[str, str]
    fallback: str | None
    """The model to take where this one is missing or does not fit."""


@dataclasses.dataclass(frozen=True, slots=True)
class Configuration:
    """All that was said, layer by layer, before a model is chosen."""

    flags: Layer
    environment: Layer
    files: tuple[File, ...]
    notices: tuple[str, ...]

    def resolve(self, model: str | None = None) -> Resolved:
        """Let the layers speak in order; `model`, a fallback's name, stands in for the one asked for."""
        files = [file.layer for file in self.files]
        said = _first_said([self.flags, self.environment, *files])
        if model is not None:
            said["model"] = Said(model, "fallback")
        asked = said["model"].value if "model" in said else None
        alias = None if asked is None else self.alias(asked)
        if alias is not None:
            target = alias.layer.get("model", said["model"])
            said = {**_first_said([self.flags, self.environment, alias.layer, *files]), "model": target}
        values = {name: each.value for name, each in said.items()}
        return Resolved(
            settings=Settings(**_of(Settings, values)),
            sampling=SamplingParams(**_of(SamplingParams, values)),
            origins={name: each.origin for name, each in said.items()},
            fallback=None if alias is None else alias.fallback,
        )

    def serving(self) -> tuple[ServerSettings, Mapping[str, str]]:
        """How to serve, and the layer of each field that was said anywhere."""
        said = _first_said([self.flags, self.environment, *(file.serving for file in self.files)])
        values = _of(ServerSettings, {name: each.value for name, each in said.items()})
        return ServerSettings(**values), {name: said[name].origin for name in values}

    def alias(self, name: str) -> Alias | None:
        """`[models.NAME]`, from the first file that has it."""
        found = (file.aliases[name] for file in self.files if name in file.aliases)
        return next(found, None)

    def close_names(self, model: str | None) -> str:
        """Names a missing model may have been meant as, for a message; empty where there are none."""
        names = {name for file in self.files for name in file.aliases} | {"default"}
        close = difflib.get_close_matches(model or "", sorted(names - {model}), n=2)
        return " or ".join(close)


def check(resolved: Resolved) -> None:
    """Ranges of all that was said, before any model is. Token ids are checked again against its vocabulary.

    Raises InvalidParameterError, which names the layer to correct.
    """
    from octavo.validate import validate_sampling_params, validate_settings

    try:
        validate_settings(resolved.settings)
        validate_sampling_params(resolved.sampling, vocab_size=1 << 31)
    except InvalidParameterError as error:
        raise where_said(error, resolved.origins) from error


def where_said(error: InvalidParameterError, origins: Mapping[str, str]) -> InvalidParameterError:
    """The error, with the layer to correct in its remedy."""
    origin = origins.get(error.parameter, FLAG)
    if origin == FLAG:
        return error
    return InvalidParameterError(
        error.message, remedy=f"Correct {origin}: it says so.", parameter=error.parameter
    )


def refuse_unseen_logprobs(configuration: Configuration, *, remedy: str) -> None:
    """Raises UsageError where a flag or a variable asks for logprobs and only the text would be printed."""
    for name in ("logprobs", "prompt_logprobs"):
        said = {
            f"--{name.replace('_', '-')}": configuration.flags,
            f"OCTAVO_{name.upper()}": configuration.environment,
        }
        for origin, layer in said.items():
            if name in layer:
                raise UsageError(
                    f"{origin} goes with --json: the text alone has no place for it", remedy=remedy
                )


def read_configuration(said: Mapping[str, Any]) -> Configuration:
    """`said` are the flags given on the command line. Raises UsageError where a layer cannot be read."""
    from platformdirs import user_config_path

    environment, notices = read_environment(Settings, SamplingParams, ServerSettings)
    folders = (Path(), user_config_path("octavo", appauthor=False))
    configuration = Configuration(
        flags={name: Said(value, FLAG) for name, value in said.items()},
        environment=environment,
        files=tuple(read_file(folder / FILE_NAME, Settings, SamplingParams) for folder in folders),
        notices=notices,
    )
    _refuse_fallback_loops(configuration)
    return configuration


def _refuse_fallback_loops(configuration: Configuration) -> None:
    for start in {name for file in configuration.files for name in file.aliases}:
        passed = [start]
        while (alias := configuration.alias(passed[-1])) is not None and alias.fallback is not None:
            if alias.fallback in passed:
                raise UsageError(
                    f"the fallback of [models.{passed[-1]}] leads back to {alias.fallback}",
                    remedy=f"Let the chain {' -> '.join([*passed, alias.fallback])} end in {FILE_NAME}.",
                )
            passed.append(alias.fallback)


def _first_said(layers: list[Layer]) -> dict[str, Said]:
    chosen: dict[str, Said] = {}
    for layer in layers:
        chosen = {**layer, **chosen}
    return chosen


def _of(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}
