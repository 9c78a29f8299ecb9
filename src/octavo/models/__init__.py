"""Model families: a config becomes a `ModelSpec` and the list of its `Parameter`s.

A family is one file with `build` (config keys -> spec) and `NAMES` (what its norms are called);
docs/architecture.md says how to add one.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from octavo.errors import ModelFormatError, UnsafeFileError, UnsupportedConfigError
from octavo.models.config_reader import ConfigReader
from octavo.models.naming import parameters
from octavo.models.parameters import Parameter
from octavo.models.spec import ModelSpec
from octavo.types import TensorNaming

_FAMILIES = {"llama": "octavo.models.llama", "gemma2": "octavo.models.gemma2"}
"""model_type -> module."""


def build_model(config: Mapping[str, Any], naming: TensorNaming) -> tuple[ModelSpec, tuple[Parameter, ...]]:
    """What the model computes, and where its weights stand in the checkpoint.

    Raises UnsupportedConfigError (naming the key) for a family or feature we cannot compute exactly, and
    ModelFormatError for a malformed value.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelFormatError(
            "the config does not say its model_type",
            remedy="Point at a folder whose config.json came with the model.",
        )
    if model_type not in _FAMILIES and config.get("auto_map"):
        raise UnsafeFileError(
            f"model_type {model_type!r} is computed by code in the checkpoint (auto_map), which is never run",
            remedy="Choose a model of a family that Octavo computes itself.",
        )
    if model_type not in _FAMILIES:
        raise UnsupportedConfigError(
            f"model_type {model_type!r} is not supported (supported: {', '.join(sorted(_FAMILIES))})",
            remedy="Choose a model of a supported family; code from the checkpoint is never run.",
            key="model_type",
        )
    family = import_module(_FAMILIES[model_type])
    reader = ConfigReader(config, model_type)
    reader.raw("quantization_config")  # of the weights' storage: read by octavo.quant.checkpoint
    spec: ModelSpec = family.build(reader)
    reader.finish()
    return spec, parameters(spec, family.NAMES, naming)
