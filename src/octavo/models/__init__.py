"""Model families: a config becomes a `ModelSpec` and the list of its `Parameter`s.

A family is one file with `build` (config keys -> spec) and `NAMES` (what its tensors are called);
docs/adding-a-model.md says how to add one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

from octavo.errors import ModelFormatError, UnsafeFileError, UnsupportedConfigError
from octavo.models.config_reader import ConfigReader
from octavo.models.naming import parameters
from octavo.models.own_head import has_own_head
from octavo.models.parameters import Parameter
from octavo.models.spec import ModelSpec
from octavo.models.unread import refuse_unread, unread_tensors
from octavo.types import TensorNaming, TensorRef

_FAMILIES = {
    model_type: f"octavo.models.{model_type}"
    for model_type in "cohere cohere2 gemma gemma2 gemma3 gemma3_text granite llama mistral mistral3 mixtral olmo2 "
    "olmo3 phi3 qwen2 qwen3 qwen3_moe smollm3 stablelm starcoder2".split()
}
"""model_type -> module."""


def build_model(
    config: Mapping[str, Any],
    naming: TensorNaming,
    *,
    tensors: Collection[str] | Mapping[str, TensorRef] = frozenset(),
    context_tokens: int | None = None,
) -> tuple[ModelSpec, tuple[Parameter, ...]]:
    """What the model computes, and where its weights stand in the checkpoint.

    `tensors` are the names in the checkpoint: where a family's checkpoints call things differently, they
    decide, and in a GGUF each must be used; with the tensors themselves, a head that the config says is the table's is
    used where it is another. `context_tokens` is the context the user asked for: rope scalings that
    depend on the length are fixed for it.

    Raises UnsupportedConfigError (naming the key or tensor) for a family or feature we cannot compute exactly, and
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
    reader = ConfigReader(config, model_type, context_tokens=context_tokens)
    reader.raw("quantization_config")  # of the weights' storage: read by octavo.quant.checkpoint
    spec: ModelSpec = family.build(reader)
    reader.finish()
    found = parameters(spec, family.NAMES, naming, tensors)
    if spec.tied_head and naming == "huggingface" and isinstance(tensors, Mapping):
        untied = replace(spec, tied_head=False)
        listed = parameters(untied, family.NAMES, naming, tensors)
        if has_own_head(listed[0], next(p for p in listed if p.name == "head.weight"), tensors):
            return untied, listed
    if naming == "gguf":
        refuse_unread(unread_tensors(spec, found, naming, tensors), spec.family)
    return spec, found
