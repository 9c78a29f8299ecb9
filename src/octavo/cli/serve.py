"""`octavo serve`: an OpenAI-compatible server for one or more models."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli.configuration import Resolved, check, read_configuration, where_said
from octavo.cli.options import Given, accepts
from octavo.cli.output import note, note_all
from octavo.errors import InvalidParameterError, UsageError
from octavo.server.settings import ServerSettings, check_server_settings
from octavo.settings import Settings

if TYPE_CHECKING:
    from octavo.server.models import ServedModel

_LOADING = [each.name for each in dataclasses.fields(Settings) if each.name != "model"]
_SERVING = [each.name for each in dataclasses.fields(ServerSettings)]


@accepts(Settings, ServerSettings, only=[*_LOADING, *_SERVING])
def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="[NAME[,ALIAS...]=]MODEL",
            help="A model to serve, under a name of its own; may be repeated. The first is loaded at the start, "
            "others with their first request [default: SmolLM2-135M-Instruct].",
        ),
    ] = None,
    *,
    said: Given,
) -> None:
    """Serve models over HTTP, with the OpenAI API.

    Settings of loading hold for all models; [models.NAME] in octavo.toml says them for one, [serve] how to serve.
    """
    from octavo.server.access import read_keys
    from octavo.server.logs import log_to_stderr
    from octavo.server.run import serve as run

    configuration = read_configuration({name: said[name] for name in _SERVING if name in said})
    note_all(configuration.notices)
    settings, origins = configuration.serving()
    keys = read_keys(settings.api_key_file, os.environ.get("OCTAVO_API_KEY"))
    admin_keys = read_keys(settings.admin_key_file, os.environ.get("OCTAVO_ADMIN_KEY"))
    try:
        check_server_settings(settings, has_keys=bool(keys))
    except InvalidParameterError as error:
        raise where_said(error, origins) from error
    loading = {name: said[name] for name in _LOADING if name in said}
    served = [_served(given, loading) for given in (model or (None,))]
    _refuse_shared_names(served)
    log_to_stderr()

    def started(port: int) -> None:
        shown = f"[{settings.host}]" if ":" in settings.host else settings.host
        note(f"serving {', '.join(each.name for each in served)} at http://{shown}:{port}/v1")

    run(settings, served, keys, started, admin_keys=admin_keys)


def _served(given: str | None, loading: dict[str, Any]) -> ServedModel:
    from octavo.server.models import ServedModel

    names, target = split_name(given)
    configuration = read_configuration(loading if target is None else {**loading, "model": target})
    chain = [configuration.resolve()]
    while (fallback := chain[-1].fallback) is not None:
        chain.append(configuration.resolve(fallback))
    if not names:
        names = (_name_of(target or chain[0].settings.model),)
    served: ServedModel | None = None
    for resolved in reversed(chain):
        check(resolved)
        _refuse_sampling_of_requests(resolved)
        served = ServedModel(names[0], names[1:], resolved.settings, resolved.sampling, served)
    assert served is not None
    return served


def _refuse_sampling_of_requests(resolved: Resolved) -> None:
    """What shapes an answer's JSON is each request's to say: as a default it would be ignored, or surprise."""
    for name in ("n", "logprobs", "prompt_logprobs"):
        if (origin := resolved.origins.get(name)) is not None:
            raise UsageError(
                f"{origin} says {name}, which no server can say for its clients",
                remedy=f"Take it out there; over HTTP each request says its own {name}.",
            )


def split_name(given: str | None) -> tuple[tuple[str, ...], str | None]:
    """NAME,ALIAS=MODEL -> ((NAME, ALIAS), MODEL). A path with = in it needs a name in front."""
    if given is None or "=" not in given:
        return (), given
    front, _, target = given.partition("=")
    names = tuple(name.strip() for name in front.split(","))
    if not target or not all(names):
        raise UsageError(f"--model {given} names nothing", remedy="Write it as NAME=MODEL.")
    return names, target


def _name_of(model: str | None) -> str:
    """What clients call a model without a name: the hub's id as it is, a path's last part without .gguf."""
    if model is None or model == "default":
        from octavo.sources.default import NAME

        return NAME
    path = Path(model)
    return path.name.removesuffix(".gguf") if path.exists() else model


def _refuse_shared_names(served: list[ServedModel]) -> None:
    seen: set[str] = set()
    for each in served:
        for name in (each.name, *each.aliases):
            if name in seen:
                raise UsageError(
                    f"two models are called {name}", remedy="Give each --model a NAME= of its own."
                )
            seen.add(name)
