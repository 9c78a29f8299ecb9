"""Names, types and ranges of `Settings`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_args

from octavo.devices import parse_device
from octavo.errors import InvalidParameterError
from octavo.settings import (
    ActivationsName,
    DtypeName,
    IsaName,
    KVDtypeName,
    QuantName,
    RunnerName,
    Settings,
    SpeculationName,
)
from octavo.validate.values import Range, flag, one_of, path, wrong

MAX_CONTEXT_TOKENS = 1 << 24
MAX_THREADS = 1024
MAX_SEQUENCES = 256


def validate_settings(settings: object) -> Settings:
    """Names, types and ranges of every field; paths given as str or PathLike take the field's type.

    Raises InvalidParameterError, with the closest name where one was misspelled.
    """
    if not isinstance(settings, Settings):
        raise wrong("settings", settings, "an octavo.Settings")
    one_of("quant", settings.quant, get_args(QuantName))
    one_of("dtype", settings.dtype, get_args(DtypeName))
    one_of("runner", settings.runner, get_args(RunnerName))
    one_of("isa", settings.isa, get_args(IsaName))
    one_of("speculation", settings.speculation, get_args(SpeculationName))
    if settings.isa != "auto" and settings.runner not in ("auto", "cpu"):
        raise InvalidParameterError(
            f"isa {settings.isa} and runner {settings.runner} contradict each other: only the CPU runner has one",
            remedy="Leave one of them out.",
            parameter="isa",
        )
    one_of("activations", settings.activations, get_args(ActivationsName))
    if settings.activations != "int16" and settings.runner == "reference":
        raise InvalidParameterError(
            f"activations {settings.activations} and runner {settings.runner} contradict each other: the "
            "reference rounds none",
            remedy="Leave one of them out.",
            parameter="activations",
        )
    one_of("kv_dtype", settings.kv_dtype, get_args(KVDtypeName))
    if settings.kv_dtype != "auto" and settings.runner not in ("auto", "cuda"):
        raise InvalidParameterError(
            f"kv_dtype {settings.kv_dtype} and runner {settings.runner} contradict each other: only the CUDA "
            "runner keeps keys and values so",
            remedy="Leave one of them out.",
            parameter="kv_dtype",
        )
    parse_device(settings.device)
    cache_dir = path("cache_dir", settings.cache_dir)
    return dataclasses.replace(
        settings,
        model=path("model", settings.model),
        revision=path("revision", settings.revision),
        context=_up_to(MAX_CONTEXT_TOKENS, "context", settings.context),
        max_sequences=_up_to(MAX_SEQUENCES, "max_sequences", settings.max_sequences),
        threads=_up_to(MAX_THREADS, "threads", settings.threads),
        deterministic=flag("deterministic", settings.deterministic),
        offline=flag("offline", settings.offline),
        cache_dir=None if cache_dir is None else Path(cache_dir),
        cache=flag("cache", settings.cache),
        filter=path("filter", settings.filter),
    )


def _up_to(most: int, parameter: str, value: object) -> int | None:
    return None if value is None else int(Range(int, 1, most).require(parameter, value))
