"""Octavo: any Hugging Face causal language model in 8 bits, at the speed the memory allows.

Public names only, each imported when it is first used, so that `import octavo` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from octavo.version import __version__

if TYPE_CHECKING:
    from octavo.errors import (
        CacheError,
        ChatTemplateError,
        ClosedError,
        ContextLengthError,
        DeviceError,
        DownloadError,
        EmptyPromptError,
        GatedModelError,
        IncompatibleModelError,
        InvalidGrammarError,
        InvalidInputError,
        InvalidParameterError,
        ModelFormatError,
        ModelNotFoundError,
        NotEnoughDiskError,
        NotEnoughMemoryError,
        NotTextError,
        NumericalError,
        OctavoError,
        ResourceError,
        UnsafeFileError,
        UnsupportedConfigError,
        UnsupportedParameterError,
        UsageError,
    )
    from octavo.llm import LLM
    from octavo.settings import SamplingParams, Settings
    from octavo.types import (
        Completion,
        FinishReason,
        Message,
        Score,
        TextEvent,
        Timings,
        TokenLogprob,
        Usage,
    )

__all__ = [
    "LLM",
    "CacheError",
    "ChatTemplateError",
    "ClosedError",
    "Completion",
    "ContextLengthError",
    "DeviceError",
    "DownloadError",
    "EmptyPromptError",
    "FinishReason",
    "GatedModelError",
    "IncompatibleModelError",
    "InvalidGrammarError",
    "InvalidInputError",
    "InvalidParameterError",
    "Message",
    "ModelFormatError",
    "ModelNotFoundError",
    "NotEnoughDiskError",
    "NotEnoughMemoryError",
    "NotTextError",
    "NumericalError",
    "OctavoError",
    "ResourceError",
    "SamplingParams",
    "Score",
    "Settings",
    "TextEvent",
    "Timings",
    "TokenLogprob",
    "UnsafeFileError",
    "UnsupportedConfigError",
    "UnsupportedParameterError",
    "Usage",
    "UsageError",
    "__version__",
]

_HOMES = {
    "LLM": "octavo.llm",
    "SamplingParams": "octavo.settings",
    "Settings": "octavo.settings",
    "Completion": "octavo.types",
    "FinishReason": "octavo.types",
    "Message": "octavo.types",
    "Score": "octavo.types",
    "TextEvent": "octavo.types",
    "Timings": "octavo.types",
    "TokenLogprob": "octavo.types",
    "Usage": "octavo.types",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    value = getattr(import_module(_HOMES.get(name, "octavo.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
